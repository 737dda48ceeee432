"""Load a hooked model, and give the rest of the package one surface over both kinds of it.

    surface.py    what every model has: W_out, b_out, embeddings, layers; `frozen` and `cast`, which put back what they change
    names.py      what the weights of a block are called, and where a model keeps them
    locks.py      one thread at a time
    keeping.py    what is kept with a model, and what shows that it changed
    identities.py which model this is: digests of parameters, configuration, tokenizer
    blocks.py     single blocks on rows of residual states, and generation that remembers keys and values
    vocabulary.py what final states say of some tokens, in one pass over the vocabulary
    conversion.py a HookedTransformer (3.9) of Hugging Face's model: configuration, angles, weights
    wrap.py       the hooked model around Hugging Face's: HookedTransformer (3.9) or TransformerBridge (4.x)
    checking.py   whether a hooked model computes what Hugging Face's does
    completeness.py  whether a checkpoint has every weight, and no more
    gemma.py      the packaged Gemma 3 270M, converted once
    resolve.py    from a name to a folder, the names that are known, and their presets
    loading.py    `load`, and the check of its logits against Hugging Face's

This package alone knows which TransformerLens is installed. Weights are never processed (no folding, no centring), so
logits are Hugging Face's and an edit can be written back to the checkpoint.
"""

from mechedit.models.blocks import Blocks, KeyValues, Sharing, Stepper
from mechedit.models.checking import PARITY, check_finite
from mechedit.models.gemma import GEMMA
from mechedit.models.identities import Identity, digest_of, identity, weight_hash
from mechedit.models.keeping import as_they_were, check_plain, dropping, forget, hooked, kept, remembered, told
from mechedit.models.loading import hugging_face, load, parity
from mechedit.models.locks import alone
from mechedit.models.names import AS_MATRIX, NAMES, biases_of, find_weight, stored_axes
from mechedit.models.resolve import Listed, listing, preset
from mechedit.models.surface import (
    HookedModel,
    ModelError,
    W_out,
    b_out,
    cast,
    check_layer,
    device_of,
    embed,
    embedding_std,
    frozen,
    has_post_mlp_norm,
    is_bridge,
    mlp_module,
    norm_after_mlp,
    plainly,
    rotated,
)

__all__ = [
    "AS_MATRIX",
    "GEMMA",
    "NAMES",
    "PARITY",
    "Blocks",
    "HookedModel",
    "Identity",
    "KeyValues",
    "Listed",
    "ModelError",
    "Sharing",
    "Stepper",
    "W_out",
    "alone",
    "as_they_were",
    "b_out",
    "biases_of",
    "cast",
    "check_finite",
    "check_layer",
    "check_plain",
    "device_of",
    "digest_of",
    "dropping",
    "embed",
    "embedding_std",
    "find_weight",
    "forget",
    "frozen",
    "has_post_mlp_norm",
    "hooked",
    "hugging_face",
    "identity",
    "is_bridge",
    "kept",
    "listing",
    "load",
    "mlp_module",
    "norm_after_mlp",
    "parity",
    "plainly",
    "preset",
    "remembered",
    "rotated",
    "stored_axes",
    "told",
    "weight_hash",
]
