"""ROME as its published code runs it, written plainly: whole forward passes with all logits, the oracle of `mechedit.editors.rome`.

Only the tokens of the prompts are taken from mechedit. The formulas are those of Meng et al. 2022 with the published code's
choices: the change is added to every row; the loss that stops the loop is the whole loss; the last iteration takes no step.
Whose key is meant differs by policy:

    published    the averaged key gives the direction, the bare prompt's key the divisor, its output the beginning of v*
    r-rome       averages over all contexts, of keys and of outputs, on both sides
    p-rome       the bare prompt's, on both sides
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechedit import keys, models, prompts
from mechedit.editors import rome
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.keys import Context
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.settings import POLICIES, RomeSettings

BY_POLICY = {"published": ("averaged", "prompt"), "r-rome": ("averaged", "averaged"), "p-rome": ("prompt", "prompt")}
"""Whose key gives the direction, and whose returns v*."""


@dataclass(frozen=True)
class Plain:
    """u of unit length, the key that returns v*, v*, and the change of W_out."""

    u: Tensor
    key: Tensor
    value: Tensor
    change: Tensor


def published_edit(
    model: HookedModel,
    rows: list[Context],
    essence: Context,
    target: list[int],
    C: Tensor,
    settings: RomeSettings,
    policy: str = "published",
) -> Plain:
    """The edit of block `settings.layer` for the contexts `rows`, the bare prompt's first."""
    mlp = model.blocks[settings.layer].mlp
    every = [[*row.ids, *target[:-1]] for row in rows] + [list(essence.ids)]
    width = max(map(len, every))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in every])
    at = torch.tensor([row.lookup for row in (*rows, essence)])
    index = torch.arange(len(every))

    kept: dict[str, Tensor] = {}
    handle = mlp.register_forward_hook(lambda module, args, output: kept.update(output=output))
    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{settings.layer}.mlp.hook_post", lambda activation, hook: kept.update(key=activation))]):  # fmt: skip
        model(tokens)
    handle.remove()
    found, outputs = (kept[name][index, at][:-1].float() for name in ("key", "output"))
    key_of = {"averaged": found.mean(0), "prompt": found[0]}
    output_of = {"averaged": outputs.mean(0), "prompt": outputs[0]}
    along, returning = BY_POLICY[policy]
    key, initial = key_of[returning].double(), output_of[returning]
    u = torch.linalg.solve(C, key_of[along].double())
    u = u / u.norm()

    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    original = None

    def add(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        return output.index_put((index, at), delta.to(output.dtype).expand(len(every), -1), accumulate=True)

    for step in range(settings.steps):
        adam.zero_grad()
        handle = mlp.register_forward_hook(add)
        log_p = model(tokens).float().log_softmax(-1)
        handle.remove()
        spoken = [log_p[row, rows[row].last + place, token] for row in range(len(rows)) for place, token in enumerate(target)]  # fmt: skip
        nll = -torch.stack(spoken).view(len(rows), len(target)).mean(1).mean()
        drifted = log_p[-1, at[-1]]
        original = drifted.detach() if original is None else original
        kl = (drifted.exp() * (drifted - original)).sum()
        loss = nll + settings.kl * kl + settings.weight_decay * delta.norm() / initial.norm() ** 2
        if loss < settings.stop_at or step == settings.steps - 1:
            break
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = settings.clamp * initial.norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    value = (initial + delta.detach()).double()
    step_right = (value - initial.double()) / (key @ u)
    return Plain(u, key, value, torch.outer(u, step_right))


def both(
    model: HookedModel, fact: Fact, moment: Moment, settings: RomeSettings, policy: str = "published"
) -> tuple[Edit, Plain]:
    """The edit of mechedit with a policy, and the plain implementation's, from the same prefixes."""
    settings = rome.resolve(model, replace(settings, **POLICIES[policy]))
    edit = rome.edit(model, fact, settings, moment)
    rows = keys.contexts(model, fact, tuple(edit.details["prefixes"]), prepend_bos=settings.prepend_bos)
    (essence,) = keys.contexts(model, Fact(fact.subject, "{} is a"), ("",), prepend_bos=settings.prepend_bos)
    target = prompts.continuation(model, fact.prompt, fact.target_new)
    with models.frozen(model):
        return edit, published_edit(model, list(rows), essence, target, moment.C, settings, policy)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_same_edit(model: HookedModel, edit: Edit, plain: Plain) -> None:
    """u, v* and the change of W_out agree to 1e-4 of their norms."""
    change = edit.changes[0]
    W_out, b_out = models.W_out(model, edit.layer).detach().double(), models.b_out(model, edit.layer).double()
    value = plain.key @ (W_out + torch.outer(change.u, change.step)) + b_out
    assert relative(change.u / change.u.norm(), plain.u) < 1e-4
    assert relative(value, plain.value) < 1e-4
    assert relative(torch.outer(change.u, change.step), plain.change) < 1e-4
