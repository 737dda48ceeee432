from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

from mechedit import figures
from mechedit.settings import TraceSettings
from mechedit.tracing import trace
from mechedit.tracing.averages import average
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


def test_all_kinds_have_one_scale_on_which_a_line_is_the_clean_run_where_a_cell_goes_beyond(load):
    found = trace(load("gpt2"), FACT, TraceSettings(draws=1))
    most = max(float(each.max()) for each in found.effects.values())
    for p_clean, lines in ((2 * most, []), (most / 2, [most / 2])):
        for kind in found.effects:
            axes, bar = figures.heat_map(replace(found, p_clean=p_clean, p_corrupted=0.0), kind).axes
            assert axes.images[0].get_clim() == pytest.approx((0.0, max(p_clean, most)))
            assert [line.get_ydata()[0] for line in bar.lines] == pytest.approx(lines)
            assert ("line: the clean run" in bar.get_ylabel()) == bool(lines)


def test_dollar_signs_in_tokens_do_not_break_a_picture(load, tmp_path):
    found = trace(load("gpt2"), FACT, TraceSettings(draws=1, kinds=("mlp",)))
    odd = replace(found, tokens=("$x_1$", "\n", *found.tokens[2:]), answer="$")
    assert all(path.stat().st_size for path in figures.save(odd, tmp_path))


def test_letters_of_other_scripts_are_shown_by_a_font_that_has_them_or_as_codes(load, tmp_path):
    found = trace(load("gpt2"), FACT, TraceSettings(draws=1, kinds=("mlp",)))
    chinese = replace(found, tokens=("法国的", "\ud7c8", *found.tokens[2:]), answer="巴黎", prompt="法国的首都是")
    has = {"法", "国", "的", "巴", "黎", "\ud7c8"}.issubset(
        {chr(code) for each in fontManager.ttflist if "Last Resort" not in each.name for code in FT2Font(each.fname).get_charmap()}
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        paths = figures.save(chinese, tmp_path)
    assert all(path.stat().st_size for path in paths)
    assert [each.category for each in told] == ([] if has else [figures.FigureWarning]), (
        "one line, and none of matplotlib's"
    )
    labels = [label.get_text() for label in _map(chinese).axes[0].get_yticklabels()]
    assert labels[0].strip("*") == ("法国的" if has else r"\u6cd5\u56fd\u7684")


def test_a_letter_is_drawn_by_the_installed_font_that_has_it():
    usual = FT2Font(findfont(FontProperties()))
    stix = FT2Font(findfont("STIXGeneral"))
    letter = chr(next(code for code in sorted(stix.get_charmap()) if code > 0x2000 and not usual.get_char_index(code)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (text,), fonts = figures._shown([f"a {letter}"])
    assert text == f"a {letter}"
    drawn = [FT2Font(findfont(name)).get_char_index(ord(letter)) for name in fonts[1:]]
    assert any(drawn)
    assert figures._shown(["Paris"])[1] == fonts[:1]


def _map(found):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", figures.FigureWarning)
        return figures.heat_map(found, "mlp")


def test_of_few_facts_no_band_is_drawn_and_the_label_says_so():
    from tests.test_averages import made

    def lines(n):
        facts = [made([[[0.1 * k, 0.2]] * 2, [[0.1, 0.1 + 0.01 * k]] * 2], subject=(0, 1), prompt=str(k)) for k in range(n)]  # fmt: skip
        return figures.role_lines(average(facts)).axes[0]

    few, many = lines(4), lines(24)
    assert few.get_ylabel() == "average indirect effect, 4 facts (too few for intervals)"
    assert many.get_ylabel() == "average indirect effect, 24 facts"
    drawn = [sum(len(path.vertices) for each in axes.collections for path in each.get_paths()) for axes in (few, many)]
    assert drawn[0] == 0 < drawn[1]
