"""C, the second moment of an MLP's keys: which directions ordinary text uses, so that an edit can avoid them.

    C = E[k k^T]        over the keys k (post-activations, [d_mlp]) of one block on text

    moment.py     C of one block, its factor, its file; published files
    corpus.py     the text: files, datasets, or samples of the model itself (the offline default)
    packaged.py   text of the packaged Gemma, which ships
    estimation.py C from text, resumably, kept in the cache
    merging.py    one C from parts or several texts
    curvature.py  G, how much what the model says depends on what the block gives: what an edit may write, as C is where it is read

Text is one stream, cut into windows of equal length, so nothing is padded. Keys of BOS are left out: every text has the same one,
and it is far from all others. Each batch's product is float32, the sum of batches float64.

A result is kept under a key that holds everything it depends on: what the block's keys depend on, layer, text, settings. A job that is
killed goes on from its last checkpoint and ends with the same bits; jobs on several machines take parts of the text.
"""

from mechedit.moments.corpus import Corpus
from mechedit.moments.curvature import Fisher, fisher
from mechedit.moments.estimation import Sums, accumulate, estimate, estimate_layers
from mechedit.moments.merging import merge
from mechedit.moments.moment import SAMPLED, Moment, MomentError, condition, read_published

__all__ = [
    "SAMPLED",
    "Corpus",
    "Fisher",
    "Moment",
    "MomentError",
    "Sums",
    "accumulate",
    "condition",
    "estimate",
    "estimate_layers",
    "fisher",
    "merge",
    "read_published",
]
