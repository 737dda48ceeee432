from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import (
    benchmark_editing,
    benchmark_editors,
    benchmark_engines,
    benchmark_fine_tuning,
    benchmark_moments,
    benchmark_neurons,
    benchmark_scaling,
    benchmark_scoring,
    benchmark_tracing,
    benchmark_values,
    better_edits,
    collapse,
    common,
    editing,
    figure1_trace,
    figure2_average_effects,
    figure3_severed,
    figure5_sweep,
    figure6_generations,
    figure7_lines,
    figure13_noise,
    figure16_attribution,
    figure23_attention,
    key_policies,
    localisation,
    many_editors,
    moments_convergence,
    mutants,
    scaling,
    table1_zsre,
    table4_counterfact,
    trained_editors,
    tuned_many,
)
from experiments.benchmark_tracing import matmul_rate
from mechedit import models, moments, provenance, scoring, sources
from mechedit.benchmarks import counterfact
from mechedit.benchmarks.zsre import Question
from mechedit.editors import rome
from mechedit.facts import Fact
from mechedit.generation import complete
from mechedit.models import loading
from mechedit.organism.world import make
from mechedit.runs.engines import Local
from mechedit.settings import (
    CONSTANTS,
    PREFIXES,
    PRESETS,
    AttentionEditSettings,
    FineTuningSettings,
    MomentSettings,
    RomeSettings,
    SweepSettings,
    TraceSettings,
)
from mechedit.tracing import trace
from mechedit.weights import Weight
from tests.conftest import assert_same_state, state, widen_bands
from tests.trained import by_hand

pytestmark = pytest.mark.anywhere

MADE_UP = [
    Fact(name, "{} is located in the city of", answer, relation="city")
    for name, answer in (("Paris", "Rome"), ("London", "Paris"), ("Berlin", "London"), ("Seattle", "Apple"))
]


@pytest.fixture
def tiny(folder, tmp_path, monkeypatch):
    """Experiments write under tmp_path, and the tiny model has a preset."""
    monkeypatch.setattr(common, "FIGURES", tmp_path)
    widen_bands(monkeypatch)
    preset = PRESETS["gemma-3-270m"]
    quick, tuned = RomeSettings(layer=1, steps=2, prefixes=((3, 1),)), FineTuningSettings(layer=1, steps=2)
    attention = AttentionEditSettings(layer=1, steps=2)
    for place in (models, loading):
        monkeypatch.setattr(
            place,
            "preset",
            lambda model: replace(preset, settings={"rome": quick, "ft": tuned, "attention-edit": attention}),
        )
    return str(folder("gpt2"))


def read(tmp_path, name):
    (path,) = tmp_path.glob(f"*/{name}.json")
    record = json.loads(path.read_text())
    assert {"settings", "origin", "versions"} <= record.keys()
    return record


@pytest.fixture(autouse=True)
def rate(monkeypatch):
    """What a processor without bfloat16 takes a minute to find."""
    for module in (benchmark_tracing, benchmark_scaling):
        monkeypatch.setattr(module, "matmul_rate", lambda device, dtype=torch.float32: 1e11)


@pytest.mark.parametrize(("each", "products"), [(0.25, 8), (0.1, 10), (60.0, 1)])
def test_a_rate_is_the_best_of_ten_products_or_of_those_of_two_seconds(each, products, monkeypatch):
    taken = []
    monkeypatch.setattr(benchmark_tracing, "seconds", lambda work, device: (None, taken.append(each) or each))
    assert matmul_rate("cpu") == pytest.approx(2 * 2048**3 / each)
    assert len(taken) == products


@pytest.mark.both
def test_the_tracing_benchmark_runs_and_its_sweep_equals_its_loops(tiny, tmp_path):
    few = ["--draws", "2", "--loop-cells", "6", "--plain-cells", "4", "--repeats", "1"]
    benchmark_tracing.main(common.parse(benchmark_tracing.BenchmarkTracing, ["--model", tiny, *few]))
    record = read(tmp_path, "benchmark_tracing*")
    rows = [*record["loop"].values(), *record["loop_in_transformerlens_layout"].values()]
    if record["transformerlens_patching"]:
        rows += record["transformerlens_patching"]["grids"].values()
    assert max(row["largest_difference"] for row in rows) < 1e-5
    assert max(row["largest_difference_of_log_p"] for row in rows) < 1e-3
    assert max(row["largest_effect_on_log_p"] for row in rows) > 0.1, "there was something to get wrong"
    assert record["loop_over_sweep"] > 0
    assert record["floor_seconds"] > record["floor_of_what_is_read_seconds"] > 0


def test_a_wrong_cell_among_probabilities_of_random_weights_is_seen():
    ours = torch.tensor([7.5e-6, 6.8e-6, 6.8e-6])
    wrong = benchmark_tracing.compared(ours.flip(0), ours, 6.8e-6)
    assert wrong["largest_difference"] < 1e-5, "which says nothing"
    assert wrong["largest_difference_of_log_p"] == pytest.approx(math.log(7.5 / 6.8), rel=1e-4)
    assert wrong["largest_effect_on_log_p"] == pytest.approx(math.log(7.5 / 6.8), rel=1e-4)


@pytest.mark.both
def test_floors_count_by_hand(tiny):
    """One cell of a two-token rest: all products of both tokens in all blocks above, or in the last block those that are read."""
    model = models.load(tiny, device="cpu")
    found = trace(model, Fact("Paris", "{} in", "Apple"), TraceSettings(kinds=("resid",), draws=1, prepend_bos=False))
    layers, width, inner = int(model.cfg.n_layers), int(model.cfg.d_model), int(model.cfg.d_mlp)
    block, tokens = 4 * width * width + 2 * width * inner, len(found.tokens)
    cells = [
        (layer, tokens - position) for layer in range(layers) for position in range(found.subject_range[0], tokens)
    ]
    unembedding = len(cells) * width * int(model.cfg.d_vocab)
    whole = sum(rest * (layers - layer - 1) * block for layer, rest in cells)
    unread = sum((rest - 1) * (block - 2 * width * width) for layer, rest in cells if layer < layers - 1)
    assert benchmark_tracing.floor_operations(model, found) == pytest.approx(2 * (whole + unembedding), rel=0.02)
    assert benchmark_tracing.floor_of_what_is_read(model, found) == pytest.approx(
        2 * (whole - unread + unembedding), rel=0.02
    )


def test_the_scaling_benchmark_measures_every_size(few, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_scaling, "FIGURES", tmp_path)
    monkeypatch.setattr(benchmark_scaling, "random_gpt2", lambda n_layers, *shape: benchmark_tracing.random_gpt2(n_layers, 2, 16, "cpu"))  # fmt: skip
    small = ["--tokens", "6", "9", "--draws", "1", "2", "--layers", "1", "3", "--facts", "2"]
    benchmark_scaling.main(common.parse(benchmark_scaling.BenchmarkScaling, ["--model", few, *small]))
    record = read(tmp_path, "benchmark_scaling")
    assert [row["draws"] for row in record["draws"]] == [1, 2]
    assert [row["layers"] for row in record["layers"]] == [1, 3]
    first, second = record["tokens"]
    assert second["tokens"] > first["tokens"]
    assert second["floor_seconds"] > first["floor_seconds"] > 0
    assert record["facts_bfloat16"]["n"] == 2
    assert next(tmp_path.rglob("benchmark_scaling.png")).stat().st_size > 0


def test_random_shapes_are_those_of_their_names(monkeypatch):
    monkeypatch.setitem(benchmark_tracing.SHAPES, "random-gpt2", (2, 2, 16))
    model = benchmark_tracing.load(benchmark_tracing.BenchmarkTracing(model="random-gpt2"))
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_vocab) == (2, 16, 50257)


@pytest.fixture
def few(tiny, tmp_path, monkeypatch):
    """Experiments over facts take four made-up ones."""
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    for module in (
        benchmark_scaling,
        figure2_average_effects,
        figure3_severed,
        figure7_lines,
        figure13_noise,
        figure16_attribution,
    ):
        if hasattr(module, "FIGURES"):
            monkeypatch.setattr(module, "FIGURES", tmp_path)
        if hasattr(module, "OUT"):
            monkeypatch.setattr(module, "OUT", tmp_path / "out")
        if hasattr(module, "known_facts"):
            monkeypatch.setattr(module, "known_facts", lambda model, n, seed: MADE_UP[:n])
    return tiny


@pytest.mark.both
def test_average_effects_and_lines_come_from_one_run(few, tmp_path):
    small = ["--model", few, "--facts", "3", "--draws", "2"]
    figure2_average_effects.main(common.parse(figure2_average_effects.AverageEffects, small))
    record = read(tmp_path, "figure2_average_effects")
    assert record["n"] == 3
    assert record["early_site"]["role"] == "subject_last"
    name = Path(few).name
    figure7_lines.main(common.parse(figure7_lines.Lines, ["--model", name]))
    lines = read(tmp_path, "figure7_lines")
    column = record["roles"].index("subject_last")
    assert lines["roles"]["mlp"]["subject_last"]["mean_of_best_layer"] == pytest.approx(
        record["mean_of_best_layer"]["mlp"][column]
    )
    assert (tmp_path / name / "figure7_lines.png").is_file()
    assert (tmp_path / name / "figure2_average_effects" / "average_mlp.png").is_file()


def test_severed_effects_say_what_is_lost(few, tmp_path):
    figure3_severed.main(common.parse(figure3_severed.SeveredEffects, ["--model", few, "--facts", "3", "--draws", "2"]))
    record = read(tmp_path, "figure3_severed")
    lost = [a - b for a, b in zip(record["ordinary"]["mean"], record["mlp"]["mean"], strict=True)]
    assert record["lost_without_mlp"]["mean"] == pytest.approx(lost)
    assert record["n"] == 3


def test_every_noise_is_compared_with_the_default(few, tmp_path):
    figure13_noise.main(common.parse(figure13_noise.NoiseAndWindows, ["--model", few, "--facts", "4", "--draws", "2"]))
    conditions = read(tmp_path, "figure13_noise")["conditions"]
    assert len(conditions) == 12
    same = conditions["gaussian, 3 sigma"]["against_default"]["subject_last"]
    assert (same["mean"], same["low"], same["high"]) == (0, None, None), "four facts are too few for an interval"
    assert conditions["window 3"]["against_default"]["subject_last"]["mean"] != 0
    for site in ("early", "late"):  # a layer chosen for each condition would favour it
        role = conditions["gaussian, 3 sigma"][f"{site}_site"]["role"]
        layers = {each["against_default"][role]["layer"] for each in conditions.values() if "against_default" in each}
        assert layers == {conditions["gaussian, 3 sigma"][f"{site}_site"]["layer"]}
    assert conditions["other tokens"]["n"] == 3, "one name has a length of its own, so nothing can take its place"


def test_gradients_are_compared_with_the_exact_trace(few, tmp_path):
    arguments = ["--model", few, "--facts", "2", "--draws", "2", "--steps", "60"]
    figure16_attribution.main(common.parse(figure16_attribution.Attribution, arguments))
    record = read(tmp_path, "figure16_attribution")
    assert record["n"] == 2
    assert record["largest_gap_of_completeness"] < 1e-3
    assert -1 <= record["integrated gradients"]["mean"] <= 1


def test_one_facts_figure_is_its_trace(few, tmp_path, monkeypatch):
    monkeypatch.setattr(figure1_trace, "FIGURES", tmp_path)
    arguments = ["--model", few, "--prompt", "Paris is in the city of", "--subject", "Paris", "--draws", "2"]
    figure1_trace.main(common.parse(figure1_trace.Figure1, arguments))
    assert read(tmp_path, "figure1_trace")["prompt"] == "Paris is in the city of"


def test_known_facts_are_asked_once_and_their_order_is_the_seeds(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setenv("MECHEDIT_DATA", str(tmp_path))
    asked = []
    monkeypatch.setattr(common.tracing, "known", lambda model, unique, progress: asked.append(1) or list(unique))
    model = models.load(tiny, device="cpu")
    first, again, other = (common.known_facts(model, 20, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(asked) == 2
    assert len(first) == 20


def test_models_of_one_world_are_compared_at_their_sites(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setattr(localisation, "FIGURES", tmp_path)
    small = ["--models", "organism", "--facts", "6", "--edited", "2", "--draws", "1"]
    localisation.main(common.parse(localisation.Localisation, small))
    (row,) = json.loads((tmp_path / "organism" / "localisation.json").read_text())["rows"].values()
    assert (row["known"], row["traced"], row["edits"]["ES"]["n"]) == (1.0, 6, 2)
    early, late = row["sites"]["MLPs, last subject token"], row["sites"]["attention, last token"]
    assert early["layer"] < late["layer"]
    assert early["effect"]["mean"] > row["sites"]["MLPs, first subject token"]["effect"]["mean"]
    table = (tmp_path / "organism" / "localisation.md").read_text()
    assert f"{100 * early['effect']['mean']:.1f} [" in table
    assert (tmp_path / "organism" / "localisation" / "organism.png").is_file()


# --- editing ----------------------------------------------------------------------------------------------------------

TO_EDIT = [
    Fact(
        each.subject,
        each.template,
        each.target_true,
        new,
        paraphrases=(f"{each.subject} is in",),
        neighbours=("Rome is in",),
    )
    for each, new in zip(MADE_UP, ("Apple", "Rome", "Paris", "London"), strict=True)
]


def counted(path, lines):
    """A text of so many lines, in a file that is named in each."""
    path.write_text("".join(f"{n} of {n * n} towns lie by {path.name}.\n" for n in range(lines)))
    return path


@pytest.fixture
def to_edit(tiny, tmp_path, monkeypatch):
    """Editing experiments take four made-up facts."""
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setattr(editing, "FIGURES", tmp_path)
    for module in (table4_counterfact, key_policies, moments_convergence):
        monkeypatch.setattr(module, "benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])
    monkeypatch.setattr(moments_convergence, "FIGURES", tmp_path)
    for constants in (CONSTANTS, PREFIXES):
        monkeypatch.setitem(constants, "published", {"steps": 2, "clamp": 4.0} if constants is CONSTANTS else ((3, 1),))
    return tiny


def test_rows_of_trained_editors_are_there_where_their_network_is(model, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "OUT", tmp_path)
    assert editing.there(model, ("ft", "mend", "ke-cf")) == ["ft"]
    place = common.runs(model, "trained") / "mend-cf"
    by_hand(model, "mend").save(place / "mend.safetensors")
    assert editing.there(model, editing.TRAINED) == ["mend-cf"]
    name, chosen = editing.opponent(model, "mend-cf", 3)
    assert (name, chosen.seed, chosen.guard) == ("mend", 3, "warn")
    assert Path(chosen.checkpoint).resolve() == place.resolve()
    organism = models.load("organism", device="cpu")
    for row in editing.there(organism, editing.TRAINED):  # what ships
        name, chosen = editing.opponent(organism, row, 0)
        assert row.startswith(name)
        assert chosen.checkpoint in ("generic", "set")


def test_scaling_and_collapse_follow_sequences_to_their_end(to_edit, tmp_path, monkeypatch):
    for module in (scaling, collapse):
        monkeypatch.setattr(module, "benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])
        monkeypatch.setattr(module, "FIGURES", tmp_path)
    quick = ["--model", to_edit, "--layer", "1"]
    sizes = [
        "--together",
        "2",
        "--scored",
        "2",
        "--search",
        "quick",
        "--sought-with",
        "4",
        "--informed",
        "2",
        "--prose",
        "24",
        "--name",
        "informed",
    ]
    prose, statements = (counted(tmp_path / name, 1000) for name in ("prose", "statements"))
    monkeypatch.setattr(scaling, "data", lambda name: prose)
    left_alone: list[int] = []
    monkeypatch.setattr(scaling, "statements", lambda model, edited, others: left_alone.append(len(edited)) or statements)  # fmt: skip
    scaling.main(common.parse(scaling.Scaling, [*quick, *sizes, "--sizes", "2", "--spared", "3"]))
    scaling.main(
        common.parse(scaling.Scaling, [*quick, *sizes, "--sizes", "2", "4"])
    )  # goes on, and keeps what it scored
    record = read(tmp_path, "informed")
    scaling.main(
        common.parse(scaling.Scaling, [*quick, *sizes, "--sizes", "4", "--name", "again"])
    )  # is scored already
    assert left_alone == [3, 4, 4], "the facts of --spared, else those that are edited"
    assert read(tmp_path, "again")["rows"] == record["rows"][1:]
    with pytest.raises(SystemExit, match=r"has 4 edits, and was not scored so at \[2\]: leave those sizes out"):
        scaling.main(common.parse(scaling.Scaling, [*quick, *sizes, "--sizes", "2", "4", "--prose", "12", "--name", "again"]))  # fmt: skip
    assert read(tmp_path, "again")["rows"] == record["rows"][1:], "and is left"
    assert record["edit"]["sought_with"] == 4
    assert record["edit"]["leave_learnt"] is True
    assert [row["edits"] for row in record["rows"]] == [2, 4]
    assert all(0 <= row[name] <= 1 for row in [record["alone"], *record["rows"]] for name in ("S", "answer", "NS"))
    assert [look["edits"] for look in record["forgetting"]] == [2, 4]
    assert all(row["prose"]["low"] <= row["prose"]["mean"] <= row["prose"]["high"] and row["prose"]["n"] == 24 for row in record["rows"])  # fmt: skip
    collapse.main(common.parse(collapse.Collapse, [*quick, "--edits", "2", "--every", "1", "--together", "2", "--rows", *collapse.COLOURS]))  # fmt: skip
    rows = read(tmp_path, "collapse")["rows"]
    assert list(rows) == list(collapse.COLOURS)
    for name, row in rows.items():
        assert row["broke"] is None or row["looks"][-1]["out"] == row["broke"]["by"]
        at_once = 2 if name == "sequential" else 1
        assert row["together"] == at_once
        assert [look["edits"] for look in row["looks"]] == list(range(at_once, row["edits"] + 1, at_once))
    assert next(tmp_path.rglob("collapse.png")).stat().st_size > 5000


def test_editors_of_many_facts_are_compared_on_the_same_facts(to_edit, tmp_path, monkeypatch):
    for module in (many_editors, scaling):
        monkeypatch.setattr(module, "benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])
    for module in (many_editors, editing):
        monkeypatch.setattr(module, "FIGURES", tmp_path)
    text = counted(tmp_path / "prose", 1000)
    monkeypatch.setattr(scaling, "data", lambda name: text)
    quick = [
        "--model",
        to_edit,
        "--layer",
        "1",
        "--sizes",
        "1",
        "2",
        "--scored",
        "2",
        "--prose",
        "24",
        "--editors",
        "memit",
    ]
    many_editors.main(common.parse(many_editors.ManyEditors, [*quick, "sequential"]))
    record = read(tmp_path, "many_editors")
    assert list(record["editors"]) == ["memit", "sequential"]
    model = models.load(to_edit)
    unedited = [own["ES"] for own in counterfact.scores(model, scaling.sample(TO_EDIT[:2], 2))]
    assert record["unedited"]["ES"]["mean"] == pytest.approx(np.mean(unedited))
    assert scaling.repeated(model, TO_EDIT[:2]) == pytest.approx(np.mean(unedited))
    assert record["unedited"]["drift"]["mean"] == 0
    for name, rows in record["editors"].items():
        assert [(row["edits"], row["standing"], row["scores"]["ES"]["n"]) for row in rows] == [(1, 1, 1), (2, 2, 2)]
        gained, difference = (
            rows[-1]["scores"][each]["mean"] - record["unedited"][each]["mean"] for each in ("ES", "drift")
        )
        paired = record["paired"]["less the unedited model"][name]
        assert (paired["ES"]["difference"]["mean"], paired["drift"]["difference"]["mean"]) == pytest.approx(
            (gained, difference)
        )
    base = record["editors"]["sequential"][-1]["scores"]["PS"]["mean"]
    assert record["paired"]["less the default"]["memit"]["PS"]["difference"]["mean"] == pytest.approx(
        record["editors"]["memit"][-1]["scores"]["PS"]["mean"] - base
    )
    assert "\n| the default is sequential |" in next(tmp_path.rglob("many_editors.md")).read_text()
    monkeypatch.setattr(many_editors, "run_sequence", lambda *args, **kwargs: pytest.fail("it is kept"))
    many_editors.main(common.parse(many_editors.ManyEditors, quick))
    assert read(tmp_path, "many_editors")["editors"]["memit"] == record["editors"]["memit"]
    with pytest.raises(pytest.fail.Exception, match="it is kept"):  # both facts at once are another run
        many_editors.main(common.parse(many_editors.ManyEditors, [*quick, "--sizes", "2"]))
    assert next(tmp_path.rglob("many_editors.png")).stat().st_size > 5000


def test_prose_is_read_from_its_end_and_the_ratio_is_of_perplexities(to_edit, tmp_path, monkeypatch):
    text = counted(tmp_path / "prose", 1000)
    monkeypatch.setattr(scaling, "data", lambda name: text)
    monkeypatch.setattr(scaling, "STRETCH", 40)
    model = models.load(to_edit)
    found = scaling.prose(model, 2)
    ends = text.read_text()[-80:]
    for one, piece in zip(found, (ends[:40], ends[40:]), strict=True):
        row = torch.tensor([model.tokenizer(piece)["input_ids"]])
        log_p = model(row)[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])
        assert one == pytest.approx(float(log_p.mean()), abs=1e-4)
    assert scaling.ratio(np.log([0.2, 0.2]), np.log([0.1, 0.1]))["mean"] == pytest.approx(2)
    assert len(scaling.prose(model, 0)) == 0


def test_what_is_published_of_editors_of_many_facts_gives_way_to_no_preset():
    """Constants of the published code, hparams/MEMIT and hparams/AlphaEdit; the organism's presets have others."""
    ways = collapse.ways(models.load("organism"), -1)
    _, alpha = ways["AlphaEdit, published"]
    assert (alpha.a, alpha.b, alpha.c, alpha.null) == (0.0, 1.0, 10.0, 0.02)
    _, memit = ways["MEMIT, published"]
    assert (memit.a, memit.b, memit.c, memit.null) == (20000 / 6400 * 768, 0.0, 0.0, 0.0)
    assert {(each.steps, each.stop, each.sought_in, each.spread) for each in (alpha, memit)} == {
        (25, "published", "stream", "left")
    }


def test_weights_of_editors_of_many_facts_are_tried_each(to_edit, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned_many, "benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])
    quick = ["--begin", "0", "--facts", "2", "--editors", "memit", "alphaedit", "--a", "1", "1e9", "--c", "1", "--null", "1e9", "--blocks", "1"]  # fmt: skip
    sought: list[int] = []
    ready = tuned_many.make_ready
    monkeypatch.setattr(tuned_many, "make_ready", lambda model, editor, own: sought.append(own.sought_with) or ready(model, editor, own))  # fmt: skip
    settings = common.parse(tuned_many.TunedMany, ["--model", to_edit, *quick, "--search", "few", "--stop-at", "0.05", "--steps", "30"])  # fmt: skip
    tuned_many.main(settings)
    assert sought == [5, 5, 5]
    ends = [{name: each.get(name) for name in ("stop", "stop_at", "steps")} for each in tuned_many.combinations(settings, "pmet", 1, 1)[:2]]  # fmt: skip
    assert ends == [{"stop": "top", "stop_at": None, "steps": None}, {"stop": "target", "stop_at": 0.05, "steps": 30}]
    found = read(tmp_path, "tuned_many")["editors"]
    light, heavy = found["memit"]
    assert (light["tried"]["a"], heavy["tried"]["a"], light["n"]) == (1.0, 1e9, 2)
    assert light["met"] > 0.5 > heavy["met"]
    assert heavy["relative_norm"] < 0.01 * light["relative_norm"]
    assert found["alphaedit"][0]["tried"] == {"layers": [1], "layer": 1, "null": 1e9, "c": 1.0}


def test_the_table_of_trained_editors_compares_the_tuned_with_the_generic(to_edit, tmp_path, monkeypatch):
    monkeypatch.setattr(trained_editors, "benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])
    model = models.load(to_edit)
    for row in ("mend", "mend-set"):
        made = by_hand(model, "mend")
        with torch.no_grad():
            made.network.rates.mul_(2.0 if row == "mend-set" else 1.0)
        made.save(common.runs(model, "trained") / row / "mend.safetensors")
    arguments = ["--model", to_edit, "--facts", "3", "--rows", *editing.TRAINED]
    trained_editors.main(common.parse(trained_editors.TrainedEditors, arguments))
    record = read(tmp_path, "trained_editors")
    assert set(record["rows"]) == {"mend", "mend-set"}
    assert record["rows"]["mend"]["scores"]["ES"]["n"] == 3
    gap = record["rows"]["mend-set"]["scores"]["EM"]["mean"] - record["rows"]["mend"]["scores"]["EM"]["mean"]
    assert record["paired"]["tuned to the set"]["mend-set less mend"]["EM"]["difference"]["mean"] == pytest.approx(gap)
    assert record["training"]["mend"]["trained_on"] == 0


def test_the_table_of_counterfact_has_every_row_and_is_resumed(to_edit, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} The Space Needle is located in the city of Seattle." for number in range(300)))
    arguments = ["--model", to_edit, "--unedited", "4", "--facts", "4", "--control-facts", "2"]
    arguments += ["--layers", "0", "1", "2"]
    names = [name for name in table4_counterfact.ROWS if name not in editing.OPPONENTS]  # no trained network is there
    arguments += ["--rows", *names, "ft", "text", "--text", str(text), "--opponent-facts", "2"]
    monkeypatch.setattr(table4_counterfact, "known", lambda model, facts: facts[:1])
    model = models.load(to_edit)
    own = json.loads(json.dumps(asdict(replace(rome.resolve(model), guard="warn"))))
    costs = {"seconds": 1.25, "peak": 3e6}
    measured = {"rome": costs | {"edit": own}, "ft": costs | {"edit": {"layer": 9}}}
    place = tmp_path / common.short_name(model) / "benchmark_editors.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"origin": provenance.origin(model), "editors": measured}))
    table4_counterfact.main(common.parse(table4_counterfact.Table4, arguments))
    record = read(tmp_path, "table4_counterfact")
    rows = record["rows"]
    assert set(rows) == {"no edit", "known", "default", "published", "identity", "random layer", "random key", "layer 0", "layer 1", "layer 2", "C of the text", "ft"}  # fmt: skip
    known = rows.pop("known")["scores"]
    (fact,) = TO_EDIT[:1]
    (p_new,) = [each.p for each in scoring.score(models.load(to_edit), [(fact.prompt, fact.target_true, fact.join)])]
    assert known["p_new"]["mean"] == pytest.approx(p_new, rel=1e-4), "of the true answer"
    assert {"NS", "S"}.isdisjoint(known)
    for name, row in rows.items():
        own = row["scores"]
        assert own["S"]["low"] <= own["S"]["mean"] <= own["S"]["high"]
        assert own["ES"]["n"] == (4 if name in ("no edit", "default", "published") else 2)
        assert own["S"]["high"] - own["S"]["low"] > 0.1, "few facts"
        assert (row["unedited"] == {}) == (name == "no edit")
    assert rows["default"]["scores"]["p_new"]["mean"] > rows["no edit"]["scores"]["p_new"]["mean"]
    assert rows["random key"]["scores"]["p_new"]["mean"] < rows["default"]["scores"]["p_new"]["mean"]
    assert rows["default"]["unedited"] == rows["no edit"]["scores"], "of the same four records"
    assert rows["identity"]["unedited"]["ES"]["n"] == 2
    kept = {path.parts[-3]: json.loads(path.read_text()) for path in tmp_path.rglob("edits/run.json")}
    assert kept["C-of-the-text"]["prepared"] != kept["default"]["prepared"]
    with pytest.raises(SystemExit, match="the row text needs --text FILE"):
        table4_counterfact.main(table4_counterfact.Table4(rows=("text",)))
    place.write_text(json.dumps({"origin": {"weights": "another model's"}, "editors": measured}))
    assert editing.costs(model, {"default": ("rome", rome.resolve(model))}) == {}
    paired = record["paired"]
    less, gains = paired["less the default"], paired["less the unedited model"]
    assert less["layer 1"]["ES"]["difference"]["mean"] == 0.0
    assert less["layer 1"]["ES"]["difference"]["low"] < -0.5, "of two facts"
    assert less["layer 1"]["ES"]["p"] == less["layer 1"]["ES"]["p_corrected"] == 1.0
    assert set(less) == set(rows) - {"no edit", "default"}
    assert set(gains) == set(rows) - {"no edit"}
    gain = rows["default"]["scores"]["EM"]["mean"] - rows["default"]["unedited"]["EM"]["mean"]
    assert gains["default"]["EM"]["difference"]["mean"] == pytest.approx(gain)
    assert paired["comparisons"] == (10 + 9) * 11, "every column but SR"
    assert record["costs"] == dict.fromkeys(("default", "layer 1", "C of the text"), costs), "ft was measured otherwise"
    lines = next(tmp_path.rglob("table4_counterfact.md")).read_text().splitlines()
    assert (
        lines[0]
        == "|  | n | S | ES | EM | PS | PM | NS | NM | answer | N+ | drift | drift_log_p | s an edit | MB an edit |"
    )
    assert [line.split(" | ")[0] for line in lines[2:7]] == ["| no edit", "| known", "| default", "| unedited, same records", "| difference"]  # fmt: skip
    assert next(line for line in lines if line.startswith("| default")).endswith("| 1.25 | 3 |")
    assert "| 89.2 | 100.0 |" in lines[-3]
    assert "of the table's 209 comparisons" in lines[-1]
    monkeypatch.setattr("mechedit.editing.edit", lambda *args, **kwargs: pytest.fail("an edit was found again"))
    table4_counterfact.main(common.parse(table4_counterfact.Table4, arguments))
    assert read(tmp_path, "table4_counterfact")["rows"] == rows | {"known": {"scores": known, "unedited": {}}}


def test_an_edit_s_seconds_and_memory_are_its_own(to_edit):
    found = benchmark_editors.run_one(benchmark_editors.BenchmarkEditors(model=to_edit, alone="rome"))
    assert 0 < found["seconds"] < 60
    assert 0 <= found["peak"] < 1e9, "without the libraries, which take more"
    assert 0 < found["p_new"] < 1


def test_the_passes_beside_an_edit_by_a_network_leave_the_model_as_it_was(to_edit):
    model = models.load(to_edit)
    before = state(model)
    assert benchmark_fine_tuning.both_ways(model, TO_EDIT[0], [Weight(1, "mlp.W_out")], True) > 0
    assert_same_state(model, before)


def test_what_was_measured_of_other_editors_is_kept_with_the_same_weights_and_threads(to_edit, tmp_path, monkeypatch):
    model, row = models.load(to_edit), {"seconds": 2.0, "peak": 3e6, "p_new": 0.5, "edit": {}}
    monkeypatch.setattr(benchmark_editors, "FIGURES", tmp_path)
    common.write("benchmark_editors", model, benchmark_editors.BenchmarkEditors(threads=1), {"editors": {"kn": row}})
    assert benchmark_editors.measured(model, 1) == {"kn": row}
    assert benchmark_editors.measured(model, 2) == {}
    with torch.no_grad():
        models.W_out(model, 0)[0, 0] += 1.0
    assert benchmark_editors.measured(model, 1) == {}


def test_the_benchmark_of_gradient_steps_compares_every_editor_with_bare_passes(tiny, tmp_path):
    few = ["--layers", "1", "3", "--steps", "2", "--repeats", "1"]
    benchmark_fine_tuning.main(common.parse(benchmark_fine_tuning.BenchmarkFineTuning, ["--model", tiny, *few]))
    record = read(tmp_path, "benchmark_fine_tuning")
    every = {f"{name}, layer {layer}" for name in ("ft", "ft-l", "attention-edit") for layer in (1, 3)}
    assert set(record["editors"]) == every, "no trained network is there"
    model = models.load(tiny)
    own = [
        (name, each.layer)
        for name, each in benchmark_fine_tuning.wanted(model, benchmark_fine_tuning.BenchmarkFineTuning())
    ]
    assert [each for each in own if each[1] == int(model.cfg.n_layers) - 1] == [(name, int(model.cfg.n_layers) - 1) for name in ("ft", "ft-l", "attention-edit")]  # fmt: skip
    for row in record["editors"].values():
        assert row["edit_seconds"] > 0 < row["bare_seconds"]
        assert row["ratio"] == pytest.approx(row["edit_seconds"] / row["bare_seconds"])


def test_figure_23_has_a_distribution_a_method_and_their_differences(to_edit, tmp_path, monkeypatch):
    for name, value in (("FIGURES", tmp_path), ("benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])):
        monkeypatch.setattr(figure23_attention, name, value)
    figure23_attention.main(common.parse(figure23_attention.Figure23, ["--model", to_edit, "--facts", "3"]))
    record = read(tmp_path, "figure23_attention")
    assert set(record["scores"]) == {"no edit", "rome", "attention-edit"}
    assert [len(own) for own in record["scores"].values()] == [3, 3, 3]
    own = record["paired"]["attention-edit less rome"]["after"]["EM"]
    means = {name: sum(row["EM"] for row in rows) / 3 for name, rows in record["scores"].items()}
    assert own["difference"]["mean"] == pytest.approx(means["attention-edit"] - means["rome"])
    figure = figure23_attention.distributions(record["scores"])
    (line,) = [each for each in figure.axes[0].lines if each.get_label() == "rome"]
    heights = dict(zip(*line.get_data(), strict=True))
    for row in record["scores"]["rome"]:
        below = sum(other["EM"] <= row["EM"] for other in record["scores"]["rome"])
        assert heights[row["EM"]] == pytest.approx(below / 3), "the share at or below it"
    assert next(tmp_path.rglob("figure23_attention.png")).stat().st_size > 5000


def test_the_table_of_zsre_has_every_row(to_edit, tmp_path, monkeypatch):
    asked = [Question(fact, "The city of Rome is?", "Paris") for fact in TO_EDIT]
    monkeypatch.setattr(table1_zsre, "questions", lambda model, begin, n: asked[begin : begin + n])
    arguments = ["--model", to_edit, "--unedited", "4", "--facts", "3", "--control-facts", "2"]
    arguments += ["--opponent-facts", "2"]
    monkeypatch.setattr(table1_zsre, "known", lambda model, facts: facts[:2])
    for some in (("random layer", "default", "identity"), ("no edit", "known", "published", "ft")):
        table1_zsre.main(common.parse(table1_zsre.Table1, [*arguments, "--rows", *some]))
    record = read(tmp_path, "table1_zsre")
    rows = record["rows"]
    assert tuple(rows) == tuple(record["settings"]["rows"]) == table1_zsre.ROWS[: len(rows)]
    assert record["costs"] == {}, "nothing was measured"
    assert [rows[name]["scores"]["efficacy"]["n"] for name in ("no edit", "published", "identity", "ft")] == [
        4,
        3,
        2,
        2,
    ]
    assert [rows[name]["unedited"]["efficacy"]["n"] for name in ("published", "identity")] == [3, 2]
    assert rows["default"]["scores"]["p_new"]["mean"] > rows["no edit"]["scores"]["p_new"]["mean"]
    known = rows["known"]["scores"]
    assert (known["efficacy"]["n"], rows["known"]["unedited"]) == (2, {})
    model = models.load(to_edit)
    own = scoring.score(model, [(fact.prompt, str(fact.target_true)) for fact in TO_EDIT[:2]])
    assert known["p_new"]["mean"] == pytest.approx(sum(each.p for each in own) / 2), (
        "the true answer, in the new one's place"
    )
    assert record["paired"]["comparisons"] == (5 + 4) * 6, (
        "of five rows with the unedited model, of four with the default"
    )
    assert record["paired"]["less the unedited model"]["ft"]["drift"]["difference"]["mean"] == pytest.approx(rows["ft"]["scores"]["drift"]["mean"])  # fmt: skip
    assert set(record["paired"]["less the default"]) == {"published", "identity", "random layer", "ft"}
    assert "| less the default | 2 |" in next(tmp_path.rglob("table1_zsre.md")).read_text()
    table1_zsre.main(common.parse(table1_zsre.Table1, [*arguments, "--rows", "no edit"]))
    assert read(tmp_path, "table1_zsre") == record, "the other rows are kept"
    (default,) = tmp_path.rglob("table1-from0/default")
    shutil.rmtree(default)
    table1_zsre.main(common.parse(table1_zsre.Table1, [*arguments, "--rows", "ft"]))
    less = read(tmp_path, "table1_zsre")["paired"]["less the default"]
    assert set(less) == {"published", "identity", "random layer"}, "a row that is made anew is compared anew, or not"
    table1_zsre.main(common.parse(table1_zsre.Table1, [*arguments, "--control-facts", "1", "--rows", "no edit"]))
    assert set(read(tmp_path, "table1_zsre")["rows"]) == {"no edit"}, "rows of other settings are not"
    with pytest.raises(SystemExit, match="rows are no edit, known, default, published, .*; found text"):
        table1_zsre.main(table1_zsre.Table1(rows=("text",)))


def test_figure_5_edits_at_layers_and_tokens_beside_the_traces(to_edit, tmp_path, monkeypatch):
    for name, value in (("FIGURES", tmp_path), ("benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])):
        monkeypatch.setattr(figure5_sweep, name, value)
    monkeypatch.setattr(figure5_sweep, "SweepSettings", lambda **given: SweepSettings(tokens=("subject_last",), draws=2, **given))  # fmt: skip
    monkeypatch.setattr(
        figure5_sweep.tracing, "known", lambda model, facts, **named: facts[1:]
    )  # the first is not known
    arguments = ["--model", to_edit, "--begin", "0", "--facts", "2", "--every", "2"]
    figure5_sweep.main(common.parse(figure5_sweep.Figure5, arguments))
    found = read(tmp_path, "figure5_sweep")["sweep"]
    assert (found["n"], found["layers"], found["tokens"]) == (2, [0, 2], ["subject_last"])
    assert next(tmp_path.rglob("figure5_sweep.png")).stat().st_size > 5000
    figure5_sweep.main(common.parse(figure5_sweep.Figure5, [*arguments, "--editor", "rome-random-key"]))
    assert read(tmp_path, "figure5_sweep_rome-random-key")["sweep"]["settings"]["editor"] == "rome-random-key"
    assert read(tmp_path, "figure5_sweep")["sweep"] == found


def test_figure_6_shows_what_every_editor_makes_the_model_write(to_edit, tmp_path, monkeypatch):
    facts = [replace(fact, generations=(f"{fact.subject} | is",)) for fact in TO_EDIT]
    for name, value in (("FIGURES", tmp_path), ("benchmark_facts", lambda model, begin, n: facts[begin : begin + n])):
        monkeypatch.setattr(figure6_generations, name, value)
    arguments = ["--model", to_edit, "--begin", "1", "--facts", "2", "--tokens", "5", "--top-k", "400"]
    model = models.load(to_edit, device="cpu")
    assert figure6_generations.suited(model) == ["rome", "ft", "attention-edit", "told", "kn"], (
        "with a preset, or no layer"
    )
    monkeypatch.setattr(figure6_generations, "suited", lambda model: ["rome", "told"])
    figure6_generations.main(common.parse(figure6_generations.Figure6, arguments))
    record = read(tmp_path, "figure6_generations")
    assert record["settings"]["editors"] == ["rome", "told"]
    assert [fact["prompt"] for fact in record["facts"]] == [fact.prompt for fact in facts[1:3]]
    for said, fact in zip(record["facts"], facts[1:3], strict=True):
        assert [each["prompt"] for each in said["texts"]] == [
            fact.prompt,
            fact.paraphrases[0],
            fact.generations[0],
            "Rome is in",
        ]
        told = next(each for each in said["edited"] if each["editor"] == "told")
        before = f"Imagine that {fact.prompt} {fact.target_new}. "
        assert told["texts"][0]["greedy"] == complete(model, before + fact.prompt, 5)
        assert said["texts"][0]["greedy"] == complete(model, fact.prompt, 5) != told["texts"][0]["greedy"]
        assert all(len({each["texts"][at]["sampled"] for each in [said, *said["edited"]]}) > 1 for at in range(3))
    page = next(tmp_path.rglob("figure6_generations.md")).read_text()
    assert page.count("| rome |") == page.count("| unedited |") == page.count("| told |") == 2 * 4
    assert "\\| is* …" in page
    assert not any(line.endswith("..") for line in page.splitlines() if line.startswith("Notes."))
    figure6_generations.main(common.parse(figure6_generations.Figure6, [*arguments, "--editors", "told"]))
    assert [each["editor"] for each in read(tmp_path, "figure6_generations")["facts"][0]["edited"]] == ["told"]


def test_the_scoring_benchmark_finds_both_ways_equal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "FIGURES", tmp_path)
    monkeypatch.setattr(benchmark_scoring, "peak", lambda settings, records: float(records))
    few = ["--model", "organism", "--records", "3", "--times", "1"]
    benchmark_scoring.main(common.parse(benchmark_scoring.BenchmarkScoring, few))
    record = read(tmp_path, "benchmark_scoring")
    assert record["largest_difference"] < 1e-5
    assert record["prompts"] == sum(2 * (1 + len(fact.paraphrases) + len(fact.neighbours)) for fact in sources.named("organism")[:3])  # fmt: skip
    assert record["peak_gigabytes"] == {"3": 3.0, "30": 30.0}
    assert record["times_as_quick"] == record["median"]["plain"] / record["median"]["mechedit"]
    benchmark_scoring.main(common.parse(benchmark_scoring.BenchmarkScoring, [*few, "--way", "memory"]))
    assert 0.1 < json.loads(capsys.readouterr().out)["gigabytes"] < 20


def test_the_neurons_benchmark_finds_all_ways_equal(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_neurons, "fact_of", lambda model, seed: MADE_UP[0])
    few = ["--model", tiny, "--steps", "3", "--cells", "3", "--repeats", "1", "--threads", "1"]
    benchmark_neurons.main(common.parse(benchmark_neurons.BenchmarkNeurons, few))
    record = read(tmp_path, "benchmark_neurons")
    for name in ("one_row", "loop"):
        assert record[name]["largest_difference_of_largest"] < 1e-5
        assert record[name]["of"] == 4 * record["prompts"] == 36
        assert record[f"{name}_over_batch"] > 0


def test_the_values_benchmark_finds_both_ways_equal_and_times_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FIGURES", tmp_path)
    ran = []

    def worker(command, *, env, **options):
        ran.append((Path(env["PYTHONPATH"]).name, command[-2:]))
        own = [{"seconds": float(len(ran)), "steps": 3}, {"seconds": 4.0 - len(ran) / 2, "steps": 4}]
        return type("Done", (), {"stdout": json.dumps(own)})

    monkeypatch.setattr(benchmark_values.subprocess, "run", worker)
    monkeypatch.setattr(benchmark_values, "commit_of", lambda folder: "1234567")
    few = ["--model", "organism", "--facts", "3", "--repeats", "2", "--threads", "1", "--edits", "2", "--old", str(tmp_path / "old")]  # fmt: skip
    benchmark_values.main(common.parse(benchmark_values.BenchmarkValues, few))
    record = read(tmp_path, "benchmark_values")
    assert record["facts"] == 3
    assert record["largest difference"] < 1e-4
    assert record["times faster"] == pytest.approx(
        record["seconds"]["one after another"] / record["seconds"]["together"]
    )
    assert record["by threads side by side"] == pytest.approx(record["seconds"]["not side by side"] / record["seconds"]["together"])  # fmt: skip
    this = Path(benchmark_values.__file__).parents[1].name
    assert ran[:4] == [("old", ["2", "1"]), (this, ["2", "1"]), (this, ["1", "quick"]), (this, ["1", "few"])]
    assert record["single edit"]["seconds"] == {
        "old": (1.0 + 1.5) / 2,
        "new": (2.0 + 1.0) / 2,
        "quick": (3.0 + 0.5) / 2,
        "few": (4.0 + 0.0) / 2,
    }
    assert record["single edit"]["of the old"] == {
        "new": pytest.approx(1.5 / 1.25),
        "quick": pytest.approx(1.75 / 1.25),
        "few": pytest.approx(2.0 / 1.25),
    }


def test_the_engines_benchmark_compares_one_process_with_a_cluster(tmp_path, monkeypatch):
    """That a cluster's results are those of this process `test_engines` proves; here another process's model stands in for it."""
    monkeypatch.setattr(common, "FIGURES", tmp_path)
    monkeypatch.setattr(benchmark_engines, "Cluster", lambda name, identity, **options: Local(models.load(name)))
    benchmark_engines.main(common.parse(benchmark_engines.BenchmarkEngines, ["--records", "2", "--threads", "1"]))
    record = read(tmp_path, "benchmark_engines")
    assert record["same_summary"]
    assert record["started"] == 1
    assert min(record["start"], record["local"], record["ray"]) > 0


def test_benchmark_rows_are_the_files_or_the_worlds(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHEDIT_DATA", str(tmp_path))
    record = {"prompt": "Rome is in", "subject": "Rome", "ground_truth": "Italy", "target_new": "Spain"}
    (tmp_path / "counterfact_flat.json").write_text(json.dumps([record, record | {"target_new": "France"}]))
    assert [fact.target_new for fact in editing.benchmark_facts("gemma-3-270m", 1, 5)] == ["France"]
    world = make()
    assert editing.benchmark_facts("organism", 3, 2) == list(world.facts[3:5])
    (question,) = table1_zsre.questions("organism", 0, 1)
    assert question.fact.prompt == world.facts[0].prompt
    zsre = world.zsre()[:3]
    (tmp_path / "zsre.json").write_text(json.dumps(zsre))
    assert [each.answer for each in table1_zsre.questions("gemma-3-270m", 1, 5)] == [
        each["loc_ans"] for each in zsre[1:]
    ]


def test_policies_are_compared_by_what_they_break(to_edit, tmp_path):
    key_policies.main(common.parse(key_policies.KeyPolicies, ["--model", to_edit, "--begin", "1", "--facts", "2", "--one-key", "1"]))  # fmt: skip
    policies = read(tmp_path, "key_policies")["policies"]
    assert list(policies) == ["default", "published", "published constants, one key"]
    assert [each["n"] for each in policies.values()] == [2, 2, 1]
    for each in policies.values():
        assert each["quantiles"]["perplexity_ratio"]["0.0"] <= each["quantiles"]["perplexity_ratio"]["1.0"]
    for name, one_key in (("default", True), ("published", False), ("published constants, one key", True)):
        share = policies[name]["quantiles"]["divisor_share"]["0.5"]
        assert (share == pytest.approx(1.0)) == one_key


def test_ways_to_edit_better_are_compared_with_the_default(to_edit, tmp_path, monkeypatch):
    record = {"roles": ["last", "subject_last"], "indirect_effect": {"mlp": [[9.0, 0.1], [9.0, 0.4], [9.0, 0.2], [9.0, 0.0]]}}  # fmt: skip
    monkeypatch.setattr(better_edits, "benchmark_facts", lambda model, begin, n: TO_EDIT[begin : begin + n])
    monkeypatch.setattr(better_edits, "FIGURES", tmp_path)
    options = [
        "--model",
        to_edit,
        "--facts",
        "2",
        "--layers",
        "1",
        "2",
        "--others",
        "2",
        "--sentences",
        "2",
        "--name",
        "ways",
    ]
    settings = common.parse(better_edits.BetterEdits, options)
    with pytest.raises(SystemExit, match="needs .*figure2_average_effects"):
        better_edits.main(settings)
    model = models.load(to_edit)
    place = tmp_path / common.short_name(model) / "figure2_average_effects.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(record))
    said = [" Paris, Berlin is what London is in.", " London is found in Paris, they say.", " It is Paris.", " nothing"]
    monkeypatch.setattr(better_edits.generation, "completions", lambda model, prompts, *rest, **named: said[: len(prompts)])  # fmt: skip
    prose, statements = (counted(tmp_path / name, 1000) for name in ("prose", "statements"))
    monkeypatch.setattr(better_edits, "data", lambda name: prose)
    monkeypatch.setattr(better_edits, "statements", lambda model, edited, others: statements)
    better_edits.main(settings)
    found = read(tmp_path, "ways")
    assert list(found["rows"]) == list(better_edits.ROWS)
    assert set(found["paired"]["less the default"]) == set(better_edits.ROWS[1:])
    assert found["rows"]["default"]["scores"] != found["rows"]["spread"]["scores"]
    assert "spread by effect" in next(tmp_path.rglob("ways.md")).read_text()
    assert better_edits.effects(model, (1, 2, 3)) == (0.4, 0.2, 1e-3)
    told = better_edits.paraphrases(model, TO_EDIT[1], prepend_bos=False)
    assert [fact.prompt for fact in told] == ["London is found in"]
    with pytest.raises(SystemExit, match="rows are default, spread"):
        better_edits.main(replace(settings, rows=("better",)))


def test_C_is_also_of_what_is_true_of_others_and_of_no_subject_that_is_asked_about(to_edit, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "OUT", tmp_path)
    model = models.load(to_edit)
    edited = replace(TO_EDIT[0], neighbours=("Berlin is located in",))
    path = editing.statements(model, [edited], TO_EDIT)
    assert path.read_text().splitlines() == [editing.stated(fact) for fact in TO_EDIT if fact.subject not in (edited.subject, "Berlin")]  # fmt: skip
    assert editing.stated(TO_EDIT[0]) == f"{TO_EDIT[0].prompt} {TO_EDIT[0].target_true}."
    prose = counted(tmp_path / "prose", 1000)
    settings = RomeSettings(layer=1, prepend_bos=True)
    both = editing.also_of(model, settings, [prose])
    windows = MomentSettings(prepend_bos=True)
    own = moments.estimate(model, 1, settings=windows)
    other = moments.estimate(model, 1, [prose], replace(windows, tokens=own.keys))
    assert (both.keys, other.keys) == (2 * own.keys, own.keys)
    torch.testing.assert_close(both.C, (own.C + other.C) / 2)


def test_more_keys_bring_the_direction_closer(to_edit, tmp_path):
    arguments = ["--times-d-mlp", "1.5", "4", "12", "--begin", "0", "--direction-facts", "3", "--edit-facts", "2"]
    moments_convergence.main(common.parse(moments_convergence.MomentsConvergence, ["--model", to_edit, *arguments]))
    rows = read(tmp_path, "moments_convergence")["rows"]
    cosines = [row["cosine"]["mean"] for row in rows]
    assert cosines == sorted(cosines)
    assert cosines[-1] == pytest.approx(1.0)
    assert [row["keys"] for row in rows] == [192, 512, 1536]
    assert next(tmp_path.rglob("moments_convergence.png")).stat().st_size > 0


def test_the_editing_benchmark_finds_both_edits_equal(to_edit, capsys):
    found = {}
    for way in ("mechedit", "plain", "default"):
        benchmark_editing.main(benchmark_editing.BenchmarkEditing(model=to_edit, steps=2, way=way))
        found[way] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["mechedit"]["update_norm"] == pytest.approx(found["plain"]["update_norm"], rel=1e-4)
    assert found["default"]["seconds"] > 0


def test_the_moments_benchmark_counts_keys_a_second(to_edit, tmp_path):
    benchmark_moments.main(benchmark_moments.BenchmarkMoments(model=to_edit, keys=4096, repeats=2))
    found = read(tmp_path, "benchmark_moments")
    assert len(found["keys_a_second"]["bare"]) == len(found["keys_a_second"]["moments"]) == 2
    assert found["moments_over_bare"] > 0


def test_speed_is_compared_with_a_checkout_alone(tmp_path):
    from experiments import benchmark_versions

    with pytest.raises(SystemExit, match="--old must be a checkout of another version"):
        benchmark_versions.main(benchmark_versions.BenchmarkVersions(old=tmp_path))


def test_versions_take_turns_and_the_best_of_each_counts(tmp_path, monkeypatch):
    from experiments import benchmark_versions

    (tmp_path / "mechedit").mkdir()
    took = iter([4.0, 3.0, 2.0, 5.0])  # old, new, old, new
    monkeypatch.setattr(benchmark_versions, "times", lambda *args: {"trace": next(took)})
    monkeypatch.setattr(benchmark_versions, "FIGURES", tmp_path)
    benchmark_versions.main(benchmark_versions.BenchmarkVersions(old=tmp_path, models=("organism",)))
    (found,) = json.loads((tmp_path / "benchmark_versions.json").read_text())["models"].values()
    assert found == {"old": {"trace": 2.0}, "new": {"trace": 3.0}, "new over old": {"trace": 1.5}}


def test_wrong_lines_are_drawn_of_every_module_first():
    found = mutants.drawn(common.parse(mutants.Mutants, ["--n", "80"]))
    assert found == mutants.drawn(mutants.Mutants(n=80))
    assert len(found) == len(set(found)) == 80
    first = found[: mutants.LEAST * len(mutants.TESTS)]
    assert {module: sum(each.module == module for each in first) for module in mutants.TESTS} == dict.fromkeys(mutants.TESTS, mutants.LEAST)  # fmt: skip
    assert {each.module for each in mutants.drawn(common.parse(mutants.Mutants, ["--n", "5", "--only", "keys"]))} == {
        "keys"
    }
    assert len(mutants.known()) == 18  # each is there, once
    with pytest.raises(SystemExit, match="--only must be of all, known, rank_one, .*; found rank_two"):
        mutants.main(mutants.Mutants(only=("rank_two",)))
