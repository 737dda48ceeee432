from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import figures
from mechedit.settings import TraceSettings
from mechedit.tracing import trace
from tests.conftest import FACT


def test_heat_maps_are_the_same_bytes_for_the_same_trace_and_star_the_subject(load, tmp_path):
    found = trace(load("gpt2"), FACT, TraceSettings(draws=1))
    first, second = (figures.save(found, tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    labels = [label.get_text() for label in figures.heat_map(found, "mlp").axes[0].get_yticklabels()]
    begin, end = found.subject_range
    assert [label.endswith("*") for label in labels] == [begin <= index < end for index in range(len(labels))]
    image = figures.heat_map(found, "mlp").axes[0].images[0].get_array()
    torch.testing.assert_close(torch.tensor(image.data), found.effects["mlp"].T)
    with pytest.raises(ValueError, match="not head"):
        figures.heat_map(found, "head")


def test_dollar_signs_in_tokens_do_not_break_a_picture(load, tmp_path):
    found = trace(load("gpt2"), FACT, TraceSettings(draws=1, kinds=("mlp",)))
    odd = replace(found, tokens=("$x_1$", "\n", *found.tokens[2:]), answer="$")
    assert all(path.stat().st_size for path in figures.save(odd, tmp_path))
