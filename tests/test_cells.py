from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import models
from mechedit.settings import PRESETS, SettingsError, TraceSettings
from mechedit.tracing import trace
from mechedit.tracing.cells import Cell, Component, window

SMALL = TraceSettings(draws=3, window=2)


def test_a_cell_that_restores_nothing_is_refused():
    with pytest.raises(ValueError, match="must restore something"):
        Cell(())


def test_a_component_stands_in_every_block():
    with pytest.raises(SettingsError, match=r"must hold \{layer\}.*blocks.0.hook_mlp_out"):
        Component("first", "blocks.0.hook_mlp_out")


def test_both_centrings_of_a_window(model, fact):
    code, paper = (trace(model, fact, replace(SMALL, kinds=("mlp",), centre=centre)) for centre in ("code", "paper"))
    torch.testing.assert_close(code.draws["mlp"][1:], paper.draws["mlp"][:-1], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(code.draws["mlp"][1:-1], paper.draws["mlp"][1:-1])
    odd = [trace(model, fact, replace(SMALL, kinds=("mlp",), window=3, centre=centre)) for centre in ("code", "paper")]
    assert torch.equal(odd[0].draws["mlp"], odd[1].draws["mlp"])


def test_a_window_not_chosen_is_the_presets_else_ten(model, fact, monkeypatch):
    assert trace(model, fact, TraceSettings(draws=1, kinds=("mlp",))).settings.window == 10
    preset = replace(PRESETS["gpt2"], window=3)
    monkeypatch.setattr(models, "preset", lambda model: preset)
    chosen = trace(model, fact, TraceSettings(draws=1, kinds=("mlp",)))
    assert chosen.settings.window == 3
    other = trace(model, fact, TraceSettings(draws=1, kinds=("mlp",), window=3))
    assert torch.equal(chosen.effects["mlp"], other.effects["mlp"])


def test_windows_are_centred_as_the_published_code_does():
    assert window(20, 10, 48) == range(15, 25)
    assert window(2, 10, 48) == range(7)
    assert window(47, 10, 48) == range(42, 48)
    assert window(5, 1, 48) == range(5, 6)
    assert window(5, 3, 48) == range(4, 7)
