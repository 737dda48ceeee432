"""An editor from outside the package, as the README shows it: the new answer's direction is written at the subject's key."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mechedit import keys, prompts
from mechedit.changes import LowRank
from mechedit.editing import Editor, Found
from mechedit.settings import EditSettings, knob
from mechedit.weights import Weight


@dataclass(frozen=True)
class LogitSettings(EditSettings):
    layer: int = knob(-1, "block whose W_out is edited, from 0")
    length: float = knob(10.0, "length of what is added to the value of the subject's key")


class LogitEditor(Editor):
    name = "logit"
    settings = LogitSettings
    grid = {"length": (1.0, 10.0)}  # noqa: RUF012

    def find(self, model, facts, settings, prepared, state, *, progress=None):
        left, right = [], []
        for fact in facts:
            (row,) = keys.contexts(model, fact, ("",), prepend_bos=settings.prepend_bos)
            key = keys.subject_keys(model, settings.layer, (row,))[0]
            new, true = (
                prompts.continuation(model, fact.prompt, target)[0] for target in (fact.target_new, fact.target_true)
            )
            direction = (model.unembed.W_U[:, new] - model.unembed.W_U[:, true]).detach()
            left.append(key / key.square().sum())
            right.append(settings.length * direction / direction.norm())
        change = LowRank(Weight(settings.layer, "mlp.W_out"), torch.stack(left), torch.stack(right))
        return Found(
            [change],
            {"rank": float(len(left))},
            state={"edited": torch.tensor(float(len(facts))) + state.get("edited", 0)},
        )
