"""From attributions to the neurons of a fact: coarse sets, a prompt each, and what their prompts agree on.

coarse  = Attr >= threshold * the largest Attr of the prompt, in any block
refined = coarse in at least a share p of the prompts; p moves by 0.05, up to 6 times, until there are between `fewest` and `most`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict

from jaxtyping import Bool, Float
from torch import Tensor

from mechedit import cache, keys, prompts, provenance
from mechedit.facts import Fact, FactError
from mechedit.files import FileError
from mechedit.models import HookedModel, check_plain, plainly
from mechedit.neurons.attribution import attributions, layers_of
from mechedit.neurons.result import Neuron, Neurons
from mechedit.progress import Progress, silent
from mechedit.settings import KnowledgeNeuronsSettings

__all__ = ["answer_ids", "coarse", "find", "refined"]

STEP, MOVES = 0.05, 6  # of p
FEWEST_PROMPTS = 3  # of a refinement
RULE = "neurons 1"  # by which they are found; another rule, another key
AFTERWARDS = (
    "action",
    "l1",
    "l2",
    "scale",
    "old",
    "direction",
    "guard",
    "bands",
    "strengthen",
)  # settings that find nothing


def find(
    model: HookedModel,
    fact: Fact,
    settings: KnowledgeNeuronsSettings | None = None,
    *,
    prefixes: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Neurons:
    """The neurons of the fact's `target_true`, in all blocks or those of the settings. The model is left as it is.

    `prefixes` stand before the prompt in place of those that the settings sample. Found once, neurons are kept in the cache.

    Raises:
        FactError: the fact has no true target, or a text does not fit the model's context.
        ModelError: there are hooks on the model.
    """
    check_plain(model)
    settings = settings or KnowledgeNeuronsSettings()
    if fact.target_true is None:
        raise FactError(f"the fact about {fact.subject!r} has no target_true, whose neurons could be found.")
    before = keys.prefixes(model, settings) if prefixes is None else tuple(prefixes)
    rows = [row.ids for row in keys.contexts(model, fact, before, prepend_bos=settings.prepend_bos)]
    answer = answer_ids(model, fact, fact.target_true, settings)
    own = {name: value for name, value in asdict(settings).items() if name not in AFTERWARDS}
    texts = (fact.subject, fact.prompt, fact.target_true, before)
    key = cache.content_key(RULE, provenance.kept_under(model), own, texts, rows, answer)
    path = cache.root() / "neurons" / f"{key}.json"
    with suppress(FileError):  # missing, or damaged
        return Neurons.load(path)
    with plainly(model):
        found = _found(model, fact, settings, before, rows, answer, progress)
    cache.keep(path, found.to_json())
    return found


def _found(
    model: HookedModel,
    fact: Fact,
    settings: KnowledgeNeuronsSettings,
    before: tuple[str, ...],
    rows: Sequence[tuple[int, ...]],
    answer: list[int],
    progress: Progress,
) -> Neurons:
    layers = layers_of(model, settings)
    found, p_answer = attributions(model, rows, answer, settings, progress=progress)
    sets, notes = coarse(found, settings.threshold), []
    share = sets.float().mean(0)
    if len(rows) < FEWEST_PROMPTS:
        kept, p = sets.any(0), 1 / len(rows)
        notes = [f"{len(rows)} prompt{'s' * (len(rows) > 1)}: neurons are refined over {FEWEST_PROMPTS} or more"]
    else:
        kept, p = refined(sets, settings.p, settings.fewest, settings.most)
        if not settings.fewest <= (n := int(kept.sum())) <= settings.most:
            notes = [f"{n} neurons are left, not {settings.fewest} to {settings.most}, with p = {p:.2f}"]
    mean = found.mean(0)

    def of(mask: Tensor) -> list[Neuron]:
        return [Neuron(layers[row], index, float(mean[row, index]), float(share[row, index])) for row, index in mask.nonzero().tolist()]  # fmt: skip

    return Neurons(
        model=str(model.cfg.model_name),
        subject=fact.subject,
        prompt=fact.prompt,
        answer=str(fact.target_true),
        n_layers=int(model.cfg.n_layers),
        prompts=tuple(prompts.behind(model, each, fact)[0] for each in before),
        p_answer=tuple(p_answer),
        p=p,
        chosen=tuple(sorted(of(kept), key=lambda each: -each.attribution)),
        coarse=tuple(of(sets.any(0))),
        notes=tuple(notes),
    )


def answer_ids(model: HookedModel, fact: Fact, answer: str, settings: KnowledgeNeuronsSettings) -> list[int]:
    """The tokens of an answer: as they follow the prompt or, as published, those of the answer alone, without the space before it."""
    if settings.answer == "published":
        return prompts.bare(model, answer, prepend_bos=False)[0]
    return prompts.continuation(model, fact.prompt, answer, fact.join)


def coarse(found: Float[Tensor, "prompt layer neuron"], threshold: float) -> Bool[Tensor, "prompt layer neuron"]:
    """Which neurons have, for each prompt, at least this share of its largest attribution; none where nothing is above 0."""
    highest = found.flatten(1).amax(1)[:, None, None]
    return (found >= threshold * highest) & (found > 0)


def refined(
    sets: Bool[Tensor, "prompt layer neuron"], p: float = 0.7, fewest: int = 2, most: int = 5
) -> tuple[Bool[Tensor, "layer neuron"], float]:
    """The neurons of at least a share p of the prompts, and p, which is moved until there are between `fewest` and `most` of them."""
    counts = sets.sum(0)
    for moves in range(MOVES + 1):
        kept = counts >= max(1, math.ceil(p * len(sets) - 1e-6))
        n = int(kept.sum())
        if fewest <= n <= most or moves == MOVES:
            break
        p = round(p + (STEP if n > most else -STEP), 6)
    return kept, p
