"""What a page shows of a result, as JSON values; grids are numbers in base64, which are a third of their length as text.

A grid is [row, layer] in float32. The draws of a trace are [row, layer, draw] in 16 bits between the lowest and the highest, for a
strip of points. Nan is what was not traced.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from mechedit import editors, figures, sites
from mechedit.edits import Edit
from mechedit.errors import MecheditError
from mechedit.runs.results import Evaluation
from mechedit.runs.sweeping import Sweep
from mechedit.settings import ROLE_TITLES, ROLES, SEVERED_TITLES, TraceSettings
from mechedit.statistics import FEWEST, UNBOUNDED, interval
from mechedit.tracing import Trace, measures
from mechedit.tracing.averages import Average
from mechedit.tracing.cells import STATES, restored_blocks
from mechedit.tracing.severing import Severed
from mechedit.viewer.evaluations import of_evaluations

__all__ = ["ViewError", "Viewable", "contents"]

Viewable: TypeAlias = Trace | Average | Severed | Sequence[Severed] | Sweep | Evaluation | Edit | Mapping[str, Any]
"""What has a page. A mapping is what `Sweep.to_json` gives, which is all that is kept of a sweep."""

STEPS = 17  # of a colour map; between them colours are mixed
SHORT = {
    "resid": "States",
    "resid_pre": "States before a block",
    "resid_mid": "States inside a block",
    "mlp": "MLP outputs",
    "attn": "Attention outputs",
}
SCORES = {"ES": "Efficacy", "PS": "Paraphrase", "NS": "Neighbourhood", "S": "S, all three", "effect": "Trace: indirect effect"}  # fmt: skip


class ViewError(MecheditError, ValueError):
    """What has no page."""


def contents(result: Viewable, other: Viewable | None = None, names: Sequence[str] = ()) -> dict[str, Any]:
    """What a page of the result shows, as `pages.page` has it.

    Raises:
        ViewError: nothing that has a page, or two that have none together.
    """
    if other is not None or isinstance(result, Evaluation):
        both = [each for each in (result, other) if each is not None]
        if not all(isinstance(each, Evaluation) for each in both):
            kinds = " and ".join(type(each).__name__ for each in both)
            raise ViewError(f"two results have a page together where both are evaluations; found {kinds}. Make a page of each.")  # fmt: skip
        return of_evaluations([each for each in both if isinstance(each, Evaluation)], names)
    if isinstance(result, Sequence) and result and all(isinstance(each, Severed) for each in result):
        return _of_severed(list(result))
    for kind, make in _MAKERS.items():
        if isinstance(result, kind):
            return make(result)
    raise ViewError(f"a page is made of a trace, an average, severed curves, a sweep, an evaluation or an edit; found {type(result).__name__}.")  # fmt: skip


def _of_trace(trace: Trace) -> dict[str, Any]:
    begin, end = trace.subject_range
    share = measures.of(trace.settings).share
    found = []
    for name, title in (("early", "Early site"), ("late", "Late site")):
        with suppress(sites.SiteError):
            site = getattr(sites, name)(trace)
            found += [_site(title, each) for each in (site, site.elsewhere) if each is not None]
    rows = [
        {"label": token, "role": ROLE_TITLES[role], "marked": begin <= index < end}
        for index, (token, role) in enumerate(zip(trace.tokens, trace.roles, strict=True))
    ]
    kinds = [
        _kind(kind, trace.settings, len(grid)) | {"values": _floats(grid.T.numpy()), "draws": _levels(trace.draws[kind].transpose(0, 1).numpy())}
        for kind, grid in trace.effects.items()
    ]  # fmt: skip
    return {
        "kind": "trace",
        "title": f"{trace.prompt} → {trace.answer.strip()}",
        "name": "Causal trace",
        "model": str(trace.origin["name"]),
        "head": _head(trace.prompt, trace.subject, trace.answer),
        "label": trace.label,
        "share": share,
        "clean": trace.p_clean,
        "corrupted": trace.p_corrupted,
        "rows": rows,
        "layers": list(range(len(next(iter(trace.effects.values()))))),
        "n_draws": trace.settings.draws,
        "kinds": kinds,
        "sites": found,
        "maps": _maps(each["map"] for each in kinds),
        "made": _made(
            trace.origin, trace.versions, trace.settings, {"corruption": trace.corrupted_by, "noise": trace.noise_std}
        ),
    }


def _of_average(mean: Average) -> dict[str, Any]:
    seen = [index for index, n in enumerate(mean.n_role) if n]
    rows = [{"label": ROLE_TITLES[ROLES[index]], "role": f"{mean.n_role[index]} facts", "marked": "subject" in ROLES[index], "n": mean.n_role[index]} for index in seen]  # fmt: skip
    kinds = [
        _kind(kind, mean.settings, len(mean.indirect[kind]))
        | {
            name: _floats(grids[kind].T.numpy()[seen])
            for name, grids in (("values", mean.indirect), ("low", mean.low), ("high", mean.high), ("restored", mean.restored))
        }
        for kind in mean.indirect
    ]  # fmt: skip
    found = []
    for name, title in (("early", "Early site"), ("late", "Late site")):
        with suppress(sites.SiteError):
            site = getattr(sites, name)(mean)
            found.append(_site(title, site) | {"row": seen.index(ROLES.index(site.role))})
    return {
        "kind": "average",
        "title": f"Average causal effects over {mean.n} facts",
        "name": "Average causal effects",
        "label": "average indirect effect",
        "share": measures.of(mean.settings).share,
        "n": mean.n,
        "few": mean.n < FEWEST,
        "rows": rows,
        "layers": list(range(len(next(iter(mean.indirect.values()))))),
        "kinds": kinds,
        "sites": found,
        "runs": {
            name: each.to_json()
            for name, each in (("clean", mean.clean), ("corrupted", mean.corrupted), ("total effect", mean.total))
        },
        "exceptions": [[subject, ROLE_TITLES[role]] for subject, role in mean.exceptions],
        "maps": _maps(each["map"] for each in kinds),
        "made": _made({}, {}, mean.settings, {}),
    }


def _of_severed(curves: Sequence[Severed]) -> dict[str, Any]:
    first, n = curves[0], len(curves)
    lines = []
    for name, title in SEVERED_TITLES.items():
        if n == 1:
            values = first.curves[name].double().numpy()
            mean, low, high = values.mean(1), values.min(1), values.max(1)
        else:
            values = np.stack([each.curves[name].mean(-1).double().numpy() - each.p_corrupted for each in curves])
            mean, (low, high) = values.mean(0), interval(values, support=UNBOUNDED)
        lines.append({"name": name, "title": title, "mean": _list(mean), "low": _list(low), "high": _list(high)})
    own = {"title": f"Severed: {first.prompt} → {first.answer.strip()}", "head": _head(first.prompt, first.subject, first.answer), "clean": first.p_clean, "corrupted": first.p_corrupted}  # fmt: skip
    draws = len(first.curves["ordinary"][0])
    return {
        "kind": "severed",
        "title": f"Severed causal traces of {n} facts",
        "name": "Severed causal trace",
        "model": str(first.origin["name"]),
        "role": ROLE_TITLES[first.role],
        "share": measures.of(first.settings).share,
        "n": n,
        "few": 1 < n < FEWEST,
        "band": f"range of {draws} draws" if n == 1 else f"95 % interval over {n} facts",
        "layers": list(range(len(lines[0]["mean"]))),
        "lines": lines,
        "made": _made(
            first.origin,
            first.versions,
            first.settings,
            {"corruption": first.corrupted_by, "shared draws": first.shared_draws},
        ),
    } | (own if n == 1 else {})


def _of_sweep(record: Mapping[str, Any]) -> dict[str, Any]:
    try:
        grids = {name: np.array(record["mean"][name], float).T for name in SCORES}
        layers, tokens = [int(each) for each in record["layers"]], [str(each) for each in record["tokens"]]
        if {grid.shape for grid in grids.values()} != {(len(tokens), len(layers))}:
            raise ValueError("a grid is not [layer, token]")
        correlations = [{"name": name, **record["correlation_with_effect"][name]} for name in ("ES", "PS", "S")]
        own, strengths = record["settings"], record.get("strengths")
        return {
            "kind": "sweep",
            "title": f"{own['editor']} at every layer and token: {record['origin']['name']}, {record['n']} facts",
            "name": "Sweep of an editor",
            "editor": str(own["editor"]),
            "model": str(record["origin"]["name"]),
            "n": int(record["n"]),
            "share": True,
            "rows": [
                {"label": ROLE_TITLES.get(token, token), "role": "", "marked": "subject" in token} for token in tokens
            ],
            "layers": layers,
            "kinds": [_score(name, grid) for name, grid in grids.items()],
            "strengths": _floats(np.array(strengths, float).T) if strengths else None,
            "correlations": correlations,
            "maps": _maps(("viridis", "Greens")),
            "made": _made(record["origin"], record.get("versions", {}), own.get("sweep", {}), own.get("edit", {})),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ViewError(f"this is no sweep that can be shown ({type(error).__name__}: {error}).") from error


def _score(name: str, grid: np.ndarray) -> dict[str, Any]:
    effect = name == "effect"
    bounds = {} if effect else {"from": 0.0, "to": 1.0}
    return {"name": name, "short": SCORES[name], "title": f"{SCORES[name]}, %", "axis": "edited layer", "map": "Greens" if effect else "viridis", "values": _floats(grid)} | bounds  # fmt: skip


def _of_edit(edit: Edit) -> dict[str, Any]:
    whole = edit.to_json()
    facts = [
        {"head": _head(each.fact["prompt"], each.fact["subject"], None), "before": each.before, "after": each.after}
        | {name: each.fact.get(name) for name in ("target_new", "target_true")}
        for each in edit.facts
    ]
    bands = _bands(edit)
    numbers = [{"name": name, "value": value, **bands.get(name, {})} for name, value in edit.report.items()]
    return {
        "kind": "edit",
        "title": f"{edit.fact['prompt']} → {edit.fact.get('target_new')}",
        "name": "Edit",
        "editor": edit.editor,
        "model": str(edit.origin["name"]),
        "facts": facts,
        "changes": whole["changes"],
        "numbers": numbers,
        "reasons": list(edit.reasons),
        "notes": list(edit.notes),
        "told": edit.told,
        "digest": edit.digest,
        "made": _made(edit.origin, edit.versions, edit.settings, {"seconds": edit.seconds}),
    }


def _bands(edit: Edit) -> dict[str, dict[str, Any]]:
    """The bands that the edit was held in, by number: those of its settings (`own`), and its editor's for the rest. What the bands of an
    editor from outside were, or those of version 0.1.0, is not known; an edit that was composed was held in none."""
    known = edit.editor in editors.BUILT_IN and not edit.is_of_0_1
    found = {name: {"from": low, "to": high, "advice": advice, "own": False} for name, (low, high, advice) in editors.named(edit.editor).bands.items()} if known else {}  # fmt: skip
    with suppress(TypeError, ValueError):  # settings of a file can be anything
        for name, low, high in edit.settings.get("bands") or ():
            found[name] = {"advice": ""} | found.get(name, {}) | {"from": float(low), "to": float(high), "own": True}
    return found


_MAKERS: dict[Any, Callable[[Any], dict[str, Any]]] = {
    Trace: _of_trace,
    Average: _of_average,
    Severed: lambda one: _of_severed([one]),
    Sweep: lambda sweep: _of_sweep(sweep.to_json()),
    Edit: _of_edit,
    Mapping: _of_sweep,
}


# --- parts ------------------------------------------------------------------------------------------------------------


def _head(prompt: str, subject: str, answer: str | None) -> dict[str, Any]:
    """A prompt in three parts, the subject in the middle, and what comes after it."""
    before, own, after = prompt.partition(subject) if subject else (prompt, "", "")
    return {"prompt": [before, own, after], "answer": answer.strip() if answer is not None else None}


def _kind(kind: str, settings: TraceSettings, layers: int) -> dict[str, Any]:
    """What is said of a kind; of one that is restored in windows the first and last block of each layer's."""
    found: dict[str, Any] = {"name": kind, "short": SHORT.get(kind, kind), "title": figures.kind_title(kind, settings.window), "axis": figures.AXES.get(kind, f"layer of {kind}"), "map": figures.COLOURS.get(kind, "Blues")}  # fmt: skip
    if kind in STATES or not settings.window:
        return found
    blocks = [restored_blocks(kind, layer, layers, settings) for layer in range(layers)]
    return found | {"window": settings.window, "blocks": [[each[0], each[-1]] for each in blocks]}


def _site(title: str, site: sites.Site) -> dict[str, Any]:
    return {"title": title, "said": str(site.__class__(**vars(site) | {"elsewhere": None})), "kind": site.kind, "layer": site.layer, "row": site.position, "p": site.p, "near": list(site.near)}  # fmt: skip


def _maps(names: Any) -> dict[str, list[str]]:
    """Colour maps of the figures, in steps."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return {name: [to_hex(mpl.colormaps[name](step / (STEPS - 1))) for step in range(STEPS)] for name in dict.fromkeys(names)}  # fmt: skip


def _made(origin: Mapping[str, Any], versions: Mapping[str, str], settings: Any, more: Mapping[str, Any]) -> list[list[str]]:  # fmt: skip
    """How a result was made, as names and texts."""
    own = dict(settings) if isinstance(settings, Mapping) else asdict(settings)
    groups: list[Mapping[str, Any]] = [origin, own, more, {f"version of {name}": each for name, each in versions.items()}]  # fmt: skip
    return [[name.replace("_", " "), _said(value)] for group in groups for name, value in group.items() if value not in ("", None, [], ())]  # fmt: skip


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _list(values: np.ndarray) -> list[float]:
    return [float(each) for each in values]


def _floats(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _levels(values: np.ndarray) -> dict[str, Any]:
    """Numbers in 16 bits, between their lowest and highest; the last level is for nan."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    step = (high - low) / 65534 or 1.0
    with np.errstate(invalid="ignore"):
        levels = np.where(np.isfinite(values), np.round((values - low) / step), 65535).astype("<u2")
    return {"low": low, "step": step, "n": values.shape[-1], "data": base64.b64encode(levels.tobytes()).decode()}
