from __future__ import annotations

import json
import statistics

import pytest

from experiments import benchmark_tracing, common, edit_built_in
from mechedit import models
from mechedit.editors import rome
from mechedit.settings import RomeSettings


@pytest.fixture
def tiny(folder, tmp_path, monkeypatch):
    """Experiments write under tmp_path, and the tiny model has a preset."""
    monkeypatch.setattr(common, "FIGURES", tmp_path)
    monkeypatch.setattr(rome, "MAX_RELATIVE_NORM", 100.0)
    preset = models.PRESETS["gemma-3-270m"]
    quick = RomeSettings(layer=1, steps=2, prefixes=((3, 1),))
    monkeypatch.setattr(models, "preset", lambda model: type(preset)(quick, True, "test"))
    monkeypatch.setattr(
        edit_built_in, "RomeSettings", lambda policy: RomeSettings(policy=policy, steps=2, prefixes=((3, 1),))
    )
    return str(folder("gpt2"))


def read(tmp_path, name):
    (path,) = tmp_path.glob(f"*/{name}.json")
    record = json.loads(path.read_text())
    assert {"settings", "origin", "versions"} <= record.keys()
    return record


def test_the_tracing_benchmark_runs_and_its_sweep_equals_its_loop(tiny, tmp_path):
    benchmark_tracing.main(
        common.parse(
            benchmark_tracing.BenchmarkTracing, ["--model", tiny, "--draws", "2", "--loop-cells", "6", "--repeats", "1"]
        )
    )
    record = read(tmp_path, "benchmark_tracing")
    assert max(record["largest_difference"].values()) < 1e-5
    assert record["loop_over_sweep"] > 1
    assert record["floor_seconds"] > 0


def test_the_editing_experiment_compares_its_rows(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} The Space Needle is located in the city of Seattle." for number in range(300)))
    edit_built_in.main(
        common.parse(edit_built_in.EditBuiltIn, ["--model", tiny, "--every", "200", "--text", str(text)])
    )
    record = read(tmp_path, "edit_built_in")
    for row in ("no edit", "default", "text", "published"):
        summary, rows = record[row]["summary"], record[row]["rows"]
        assert summary["n"] == len(rows) == 2
        assert summary["NS"] == pytest.approx(100 * statistics.mean(each["NS"] for each in rows))
    assert record["text"]["source"] != record["default"]["source"]


def test_a_summary_is_means_in_percent_and_their_harmonic_mean():
    rows = [{"ES": 1.0, "PS": 0.5, "NS": 1.0, "p_new": 0.2}, {"ES": 0.0, "PS": 0.5, "NS": 0.5, "p_new": 0.4}]
    summary = edit_built_in.summary(rows)
    assert (summary["ES"], summary["PS"], summary["NS"], summary["n"]) == (50, 50, 75, 2)
    assert summary["S"] == pytest.approx(3 / (1 / 50 + 1 / 50 + 1 / 75))
