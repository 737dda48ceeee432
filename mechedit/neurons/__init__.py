"""Knowledge neurons: which numbers of an MLP's activation carry an answer (Dai et al. 2022, section 3), in a causal model.

    w       activations of one block's MLP at the prompt's last token, after the nonlinearity: what `W_out` reads, which in a gated MLP is
            the product act(gate) * up
    Attr    = w / m * sum_k dP(answer)/dw at (k/m) w, k = 1..m       integrated gradients from 0, a right Riemann sum
    coarse  = Attr >= threshold * the largest Attr of the prompt, in any block
    refined = coarse in at least a share p of the prompts; p moves by 0.05, up to 6 times, until there are between `fewest` and `most`

P(answer) is that of the whole answer, the product over its tokens, each given those before it: the answer is what the fact is about, and
its first token alone may begin many. The prompts are the fact's own behind sampled prefixes, those of ROME's keys. The paper has other
wordings of the fact; those of benchmarks are what editors are judged by, so that none is read here. With fewer than three prompts
nothing is refined: the coarse sets are all there is.

    attribution.py  integrated gradients, in batches
    finding.py      coarse and refined sets, and `find`
    result.py       Neurons, and their file
"""

from mechedit.neurons.attribution import attributions, layers_of
from mechedit.neurons.finding import answer_ids, coarse, find, refined
from mechedit.neurons.result import Neuron, Neurons

__all__ = ["Neuron", "Neurons", "answer_ids", "attributions", "coarse", "find", "layers_of", "refined"]
