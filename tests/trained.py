"""Networks of editors that are trained, made by hand, so that they edit without having been trained."""

from __future__ import annotations

from pathlib import Path

import torch

from mechedit.editors.trained import state
from mechedit.settings import KeTraining, MendTraining

MEND = MendTraining(rank=4, edit_rate=0.05)
KE = KeTraining(lstm=4, condition=6, hidden=5)


def by_hand(model, editor):
    """MEND as it begins: a gradient step. KE whose mask is a step against the gradient of the same length."""
    if editor == "mend":
        return state.new(model, "mend", MEND)
    made = state.new(model, "ke", KE)
    with torch.no_grad():
        for head, (d_in, d_out) in zip(made.network.heads, made.network.shapes.values(), strict=True):
            last = head[2]
            last.length.zero_()  # the bias alone speaks
            p, q, r, s, e = torch.zeros(d_in), torch.full((d_out,), -0.1 * d_in), torch.zeros(d_in), torch.zeros(d_out), torch.zeros(1)  # fmt: skip
            last.bias.copy_(torch.cat([p, q, r, s, e]))
    return made


def checkpoint(model, editor, folder: Path) -> str:
    """A file of such a network."""
    return str(by_hand(model, editor).save(folder / f"{editor}.safetensors"))


def scrambled(network, seed=0):
    """Every parameter and statistic a random number, so that none is overlooked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in network.state_dict().items():
            if name.endswith("seen"):
                each.fill_(11.0)
            else:
                drawn = torch.randn(each.shape, generator=generator).to(each) * 0.3
                each.copy_(drawn.abs() + 0.5 if name.endswith(("squares", "length")) else drawn)
    return network
