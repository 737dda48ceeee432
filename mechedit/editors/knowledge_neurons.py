"""Knowledge neurons as an editor: the neurons that carry the true answer write the new one (Dai et al. 2022, section 4).

    v_i        the row of `W_out` that neuron i writes, its value
    update     v_i += -l1 |v_i| / |e_old| e_old + l2 |v_i| / |e_new| e_new        e: the direction of the answer's first token
    erase      v_i = 0, of the 20 neurons that are most frequent among the facts'
    suppress   v_i = 0, of all: the activation times 0
    amplify    v_i = 2 v_i: the activation times 2

The paper takes e from word embeddings, which in its model are the unembedding too. Where the two differ the default is the unembedding,
the direction that the answer is read from. A blank token that an answer begins with is passed over. Neurons are found as
`mechedit.neurons` says, for each fact alone; those that many facts of a relation share are not left out, as the paper does where it has a
relation's facts. Nothing is learnt, and no layer is chosen.

The policy `published` is the code behind the table of Meng et al. 2022: activations before the nonlinearity, both ends of the path, one prompt, hence no
refinement, answers without the space before them, each token of which is scored at the prompt's end, and rows changed by
-2 e of the model's own next token and +1 e of each of the target's. It hooks GPT-2 alone; in a gated MLP `pre` is what the gate's nonlinearity reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import keys, models, neurons, scoring
from mechedit.cache import content_key
from mechedit.changes import Rows
from mechedit.editing import Editor, Found, State
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.neurons import Neurons
from mechedit.progress import Progress, silent
from mechedit.settings import KnowledgeNeuronsSettings
from mechedit.tracing.preparation import blanks_of
from mechedit.weights import Weight

__all__ = ["KnowledgeNeurons", "Prefixes"]

ERASED = 20
Place = tuple[int, int]
"""A neuron: block, and row of its `W_out`."""


@dataclass(frozen=True)
class Prefixes:
    """What stands before each prompt."""

    texts: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        """A digest of them."""
        return content_key(self.texts)


class KnowledgeNeurons(Editor):
    """Knowledge neurons as an editor."""

    name = "kn"
    settings: ClassVar[type[KnowledgeNeuronsSettings]] = KnowledgeNeuronsSettings
    strength = "l2"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"l2": (2.0, 8.0, 32.0), "threshold": (0.1, 0.2, 0.3)}

    def resolve(self, model: HookedModel, settings: KnowledgeNeuronsSettings | None = None) -> KnowledgeNeuronsSettings:
        resolved: KnowledgeNeuronsSettings = super().resolve(model, settings)
        for layer in resolved.layers or range(int(model.cfg.n_layers)):
            models.mlp_module(model, layer)
        return resolved

    def prepare(
        self, model: HookedModel, settings: KnowledgeNeuronsSettings, *, progress: Progress = silent
    ) -> Prefixes:
        return Prefixes(keys.prefixes(model, settings))

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: KnowledgeNeuronsSettings,
        prepared: Prefixes | None,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        before = prepared.texts if prepared is not None else None
        found = [neurons.find(model, fact, settings, prefixes=before, progress=progress) for fact in facts]
        if not any(each.chosen for each in found):
            raise EditError(
                f"no neuron carries {facts[0].target_true!r} after {facts[0].prompt!r} in {found[0].p:.0%} of {len(found[0].prompts)} prompts. "
                "Lower p or threshold."
            )
        changes = _as_changes(model, _rows(model, facts, found, settings))
        report = {
            "neurons": float(sum(len(each.chosen) for each in found)),
            "coarse": float(sum(len(each.coarse) for each in found)),
        }
        return Found(changes, report, _details(found))


def _rows(
    model: HookedModel, facts: Sequence[Fact], found: Sequence[Neurons], settings: KnowledgeNeuronsSettings
) -> dict[Place, Float[Tensor, " d_model"]]:
    """What is added to each neuron's value, in float64."""
    places = Counter((each.layer, each.index) for own in found for each in own.chosen)
    if settings.action == "erase":
        places = Counter(dict(places.most_common(ERASED)))
    values = {place: models.W_out(model, place[0])[place[1]].detach().cpu().double() for place in places}
    if settings.action != "update":
        return {place: value if settings.action == "amplify" else -value for place, value in values.items()}
    added = {place: torch.zeros_like(value) for place, value in values.items()}
    for fact, own in zip(facts, found, strict=True):
        old, new = _directions(model, fact, settings)
        for place in ((each.layer, each.index) for each in own.chosen):
            length = values[place].norm() if settings.scale == "row" else None
            added[place] += settings.l2 * _scaled(new, length) - settings.l1 * _scaled(old, length)
    return added


def _scaled(e: Float[Tensor, " d_model"], length: Float[Tensor, ""] | None) -> Float[Tensor, " d_model"]:
    """The direction with this length; as it is where there is none."""
    return e if length is None else e * (length / e.norm())


def _directions(
    model: HookedModel, fact: Fact, settings: KnowledgeNeuronsSettings
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """e_old and e_new."""
    true, new = (neurons.answer_ids(model, fact, str(each), settings) for each in (fact.target_true, fact.target_new))
    if settings.old == "greedy":
        true = [scoring.top(model, fact.prompt, 1, prepend_bos=settings.prepend_bos)[0][1]]
    if settings.answer == "published":
        return _direction(model, true[:1], settings), _direction(model, new, settings)
    first, second = (each[blanks_of(model, each)] for each in (true, new))
    return _direction(model, [first], settings), _direction(model, [second], settings)


def _direction(model: HookedModel, tokens: list[int], settings: KnowledgeNeuronsSettings) -> Float[Tensor, " d_model"]:
    """The sum of the tokens' directions, in float64."""
    ids = torch.tensor(tokens, device=models.device_of(model))
    if settings.direction == "embedding":
        return models.embed(model, ids[None])[0].detach().cpu().double().sum(0)
    return model.unembed.W_U[:, ids].detach().cpu().double().sum(1)


def _as_changes(model: HookedModel, rows: dict[Place, Float[Tensor, " d_model"]]) -> list[Rows]:
    """The rows of each block as one change."""
    changes = []
    for layer in sorted({layer for layer, _ in rows}):
        own = {index: row for (block, index), row in sorted(rows.items()) if block == layer}
        height = models.W_out(model, layer).shape[0]
        changes.append(Rows(Weight(layer, "mlp.W_out"), torch.tensor(list(own)), torch.stack(list(own.values())).float(), height))  # fmt: skip
    return changes


def _details(found: Sequence[Neurons]) -> dict[str, Any]:
    """The neurons of each fact, and what they were found on."""
    return {
        "neurons": [[asdict(each) for each in own.chosen] for own in found],
        "p": [own.p for own in found],
        "p_answer": [list(own.p_answer) for own in found],
        "prompts": [list(own.prompts) for own in found],
        "notes": [list(own.notes) for own in found],
    }
