"""MEND and KE as editors: one pass forward, one backward, and a network makes an edit of the gradient.

A change is kept as factors, a token each: an edit of 12 tokens is of rank 12 at most in each weight. Several facts are the sum of their
edits. The network comes from a checkpoint, whose digest is in every edit (`settings.digest`, `details.prepared`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import files, models
from mechedit.changes import LowRank
from mechedit.editing import Editor, Found, State
from mechedit.editors.trained import state as states
from mechedit.editors.trained.factors import Term, Terms, added, factors
from mechedit.editors.trained.ke import Condition, Ke
from mechedit.editors.trained.rows import Rows, of_fact
from mechedit.editors.trained.state import Trained, check_belongs, condition_text, file_of
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.prompts import encode
from mechedit.settings import KeSettings, MendSettings, TrainedSettings
from mechedit.weights import Weight

__all__ = ["KeEditor", "MendEditor", "condition_text", "conditions_of"]

TOGETHER = 32  # facts whose gradients are found at once


class TrainedEditor(Editor):
    """What both share."""

    strength = "scale"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"scale": (0.5, 1.0, 2.0)}

    def resolve(self, model: HookedModel, settings: TrainedSettings | None = None) -> Any:
        """As every editor's, and the checkpoint's digest.

        Raises:
            EditError: there is no checkpoint, or it is none of this model, editor, form or digest.
        """
        resolved: TrainedSettings = super().resolve(model, settings)
        path = file_of(model, self.name, resolved.checkpoint)
        digest, record = files.described(path, states.KIND)
        check_belongs(model, self.name, record, resolved.form, str(path))
        if resolved.digest not in ("", digest):
            raise EditError(f"{path} has the digest {digest[:12]}…, and that of the settings is {resolved.digest[:12]}…: it is another checkpoint.")  # fmt: skip
        bos = record["settings"].get("prepend_bos")
        if resolved.prepend_bos != bos:
            raise EditError(f"{path} was trained {'with' if bos else 'without'} BOS; give prepend_bos={bos}.")
        return replace(resolved, digest=digest)

    def prepare(self, model: HookedModel, settings: TrainedSettings, *, progress: Progress = silent) -> Trained:
        trained = states.load(path := file_of(model, self.name, settings.checkpoint))
        if trained.key != settings.digest:
            raise EditError(f"{path} is another checkpoint than it was a moment ago.")
        trained.network.to(models.device_of(model)).requires_grad_(False)
        return trained

    def check(
        self, model: HookedModel, facts: Sequence[Fact], settings: TrainedSettings, prepared: Trained | None
    ) -> None:
        models.check_plain(model)
        if prepared is not None:
            check_belongs(model, self.name, prepared.record, settings.form, "what was prepared")

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: TrainedSettings,
        prepared: Trained,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        parts: list[Terms] = []
        losses: list[float] = []
        for begin in range(0, len(facts), TOGETHER):
            progress("gradients", begin, len(facts))
            part = facts[begin : begin + TOGETHER]
            rows = Rows(model, [of_fact(model, fact, prepend_bos=bool(settings.prepend_bos)) for fact in part], prepared.weights[0].layer)  # fmt: skip
            own, loss = factors(rows, prepared.weights)
            with torch.no_grad():
                terms = prepared.network.terms(own, conditions_of(model, prepared, part))
                parts.append(self.scaled(rows, terms, settings))
            losses += loss.tolist()
        progress("gradients", len(facts), len(facts))
        changes = [_change(weight, [part[weight] for part in parts]) for weight in prepared.weights]
        report = {"loss": sum(losses) / len(losses), "rank": float(max(len(each.left) for each in changes))}
        return Found(changes, report, {"trained_on": sum(prepared.seen([fact.subject for fact in facts]))})

    def scaled(self, rows: Rows, terms: Terms, settings: Any) -> Terms:
        """The terms as strong as the settings have them."""
        return times(terms, torch.full((rows.count,), settings.scale))


class MendEditor(TrainedEditor):
    """MEND as an editor."""

    name = "mend"
    settings: ClassVar[type[MendSettings]] = MendSettings


class KeEditor(TrainedEditor):
    """KE as an editor."""

    name = "ke"
    settings: ClassVar[type[KeSettings]] = KeSettings

    def scaled(self, rows: Rows, terms: Terms, settings: KeSettings) -> Terms:
        """The change, up to so many times, until the model says the target."""
        chosen, edits = torch.full((rows.count,), settings.scale), torch.arange(rows.count, device=rows.entering.device)
        for repeat in range(2, settings.repeats + 1):
            with added(rows.blocks.model, times(terms, chosen), edits):
                final = rows.final()
            says = rows.says(rows.log_p(final)).bool().cpu()
            if says.all():
                break
            chosen = torch.where(says, chosen, repeat * settings.scale)
        return times(terms, chosen)


def times(terms: Terms, factor: Float[Tensor, " edits"]) -> dict[Weight, Term]:
    """Each edit's terms times a number of its own."""
    return {
        weight: replace(own, right=own.right * factor.to(own.right)[:, None, None]) for weight, own in terms.items()
    }


def _change(weight: Weight, terms: Sequence[Term]) -> LowRank:
    """The sum of all edits, without the tokens that add nothing."""
    left, right = (torch.cat([part.flatten(0, 1) for part in each]) for each in (([term.left for term in terms]), ([term.right for term in terms])))  # fmt: skip
    there = (left != 0).any(-1) & (right != 0).any(-1)
    return LowRank(weight, left[there].cpu().contiguous(), right[there].cpu().contiguous())


def conditions_of(model: HookedModel, trained: Trained, facts: Sequence[Fact]) -> list[Condition]:
    """The conditions of some facts, where the network takes any."""
    if not isinstance(trained.network, Ke):
        return []
    texts = [condition_text(fact, trained.settings.form) for fact in facts]
    ids = [torch.tensor(encode(model, text, prepend_bos=False)[0]) for text in texts]
    return embedded(model, trained.network, ids)


def embedded(model: HookedModel, network: Ke, ids: Sequence[Int[Tensor, _]]) -> list[Condition]:
    """The ids, or the model's embeddings of them where the network has none of its own."""
    if network.embeddings is not None:
        return list(ids)
    return [models.embed(model, each[None].to(models.device_of(model)))[0] for each in ids]
