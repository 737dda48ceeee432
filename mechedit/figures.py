"""Pictures of traces, the paper's heat maps, one a kind, and of neurons, as PNG and SVG. No model is needed, and no window opens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mechedit.cache import atomic_write
from mechedit.settings import ROLE_TITLES, ROLES, SEVERED_TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mechedit.neurons import Neurons
    from mechedit.tracing import Trace
    from mechedit.tracing.averages import Average
    from mechedit.tracing.severing import Severed

__all__ = [
    "FigureWarning",
    "average_map",
    "heat_map",
    "kind_title",
    "neurons",
    "role_lines",
    "save",
    "save_average",
    "save_neurons",
    "save_severed",
    "severed_lines",
    "training_curves",
    "write",
]


class FigureWarning(UserWarning):
    """A picture that cannot show what it is of."""


COLOURS = {"resid": "Purples", "mlp": "Greens", "attn": "Reds"}
TITLES = {
    "resid": "Restoring one state after corrupted input",
    "resid_pre": "Restoring one state before a block",
    "resid_mid": "Restoring one state between attention and MLP",
    "mlp": "Restoring MLP outputs in a window of {window}",
    "attn": "Restoring attention outputs in a window of {window}",
}
AXES = {
    "resid": "layer of the restored state",
    "resid_pre": "layer of the restored state",
    "resid_mid": "layer of the restored state",
    "mlp": "layer at the centre of the restored MLP outputs",
    "attn": "layer at the centre of the restored attention outputs",
}

MARKED = 0.02  # of the scale: so far below its end the clean run has a mark of its own


def heat_map(trace: Trace, kind: str) -> Figure:
    """P(answer) by token and layer for one kind, subject tokens starred (Meng et al. 2022, figure 1).

    The colours of all kinds run alike, from the corrupted probability, which is white, to the clean one, or further where a cell does. Then a
    line on the scale is the clean one.
    """
    import numpy as np
    from matplotlib.figure import Figure

    if kind not in trace.effects:
        raise ValueError(f"the trace has kinds {', '.join(trace.effects)}, not {kind}.")
    grid = trace.effects[kind].T.numpy()
    every = np.stack(list(trace.effects.values()))
    lowest = min(trace.p_corrupted, float(np.nanmin(every)))
    highest = max(trace.p_clean, float(np.nanmax(every)))
    is_over = highest - trace.p_clean > MARKED * (highest - lowest)
    begin, end = trace.subject_range
    labels = [
        token.replace("\n", "⏎") + ("*" if begin <= index < end else "") for index, token in enumerate(trace.tokens)
    ]
    figure = Figure(
        figsize=(max(5.0, 3.2 + 0.16 * grid.shape[1]), max(2.8, 1.6 + 0.21 * grid.shape[0])),
        dpi=150,
        layout="constrained",
    )
    axes = figure.add_subplot()
    image = axes.imshow(
        grid,
        cmap=COLOURS.get(kind, "Blues"),
        vmin=lowest,
        vmax=highest,
        aspect="auto",
        interpolation="nearest",
    )
    runs = f"{trace.origin['name']}: {trace.p_clean:.3f} clean, {trace.p_corrupted:.3f} corrupted"
    label = trace.label + ("   (line: the clean run)" if is_over else "")
    (*labels, label, runs), fonts = _shown([*labels, label, runs])
    axes.set_yticks(range(len(labels)), labels, fontsize=9, fontfamily=fonts)
    axes.set_xticks(range(0, grid.shape[1], 1 if grid.shape[1] <= 12 else 5 if grid.shape[1] > 24 else 2))
    axes.set_xlabel(AXES.get(kind, f"layer at the centre of the restored {kind}") + "   (* subject)", fontsize=9)
    axes.set_title(f"{kind_title(kind, trace.settings.window)}\n{runs}", fontsize=9, fontfamily=fonts)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(label, fontsize=9, fontfamily=fonts)
    if is_over:
        bar.ax.axhline(trace.p_clean, color="black", linewidth=1.5)
    return figure


def average_map(mean: Average, kind: str) -> Figure:
    """The average indirect effect by token role and layer; what was not seen is left blank, negative effects are shown."""
    from matplotlib.figure import Figure

    grid = mean.indirect[kind].T.numpy()
    seen = [index for index, row in enumerate(grid) if not (row != row).all()]
    figure = Figure(figsize=(4.2 + 0.16 * grid.shape[1], 1.6 + 0.24 * len(seen)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        grid[seen], cmap=COLOURS.get(kind, "Blues"), vmin=min(0.0, float(grid[seen].min())), aspect="auto"
    )
    axes.set_yticks(
        range(len(seen)), [f"{ROLE_TITLES[ROLES[index]]} ({mean.n_role[index]})" for index in seen], fontsize=9
    )
    axes.set_xticks(range(0, grid.shape[1], 1 if grid.shape[1] <= 12 else 5 if grid.shape[1] > 24 else 2))
    axes.set_xlabel(AXES.get(kind, f"layer of {kind}"), fontsize=9)
    axes.set_title(f"Average indirect effect over {mean.n} facts", fontsize=10)
    figure.colorbar(image, ax=axes).ax.set_title("AIE", fontsize=9, pad=8)
    return figure


def role_lines(mean: Average, roles: Sequence[str] = ("subject_first", "subject_middle", "subject_last", "after_first", "last")) -> Figure:  # fmt: skip
    """The average indirect effect by layer, a panel a kind, a line a token role, with 95 % intervals over facts; none
    are drawn of few facts, and the label says so."""
    from matplotlib.figure import Figure

    kinds = list(mean.indirect)
    figure = Figure(figsize=(3.6 * len(kinds), 3.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for role in roles:
            column = ROLES.index(role)
            line = mean.indirect[kind][:, column]
            if line.isnan().all():
                continue
            layers = range(len(line))
            (drawn,) = axes.plot(layers, line, label=ROLE_TITLES[role], linewidth=1.4)
            low, high = mean.low[kind][:, column], mean.high[kind][:, column]
            axes.fill_between(layers, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_title(kind_title(kind, mean.settings.window), fontsize=8)
        axes.set_xlabel("layer", fontsize=9)
    panels[0].set_ylabel(f"average indirect effect, {_of(mean.n)}", fontsize=9)
    panels[0].legend(fontsize=7)
    return figure


def severed_lines(curves: Sequence[Severed]) -> Figure:
    """The effect of restoring one state, with nothing, the MLPs and attention held, by layer; intervals over facts,
    where there are enough of them."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from mechedit.statistics import UNBOUNDED, interval

    figure = Figure(figsize=(4.6, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("ordinary", "C4"), ("mlp", "C2"), ("attn", "C3")):
        effects = np.stack([each.curves[name].mean(-1).double().numpy() - each.p_corrupted for each in curves])
        layers = range(effects.shape[1])
        axes.plot(layers, effects.mean(0), color=colour, label=SEVERED_TITLES[name], linewidth=1.4)
        if len(curves) > 1:
            axes.fill_between(layers, *interval(effects, support=UNBOUNDED), color=colour, alpha=0.2, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"layer of the restored state, {ROLE_TITLES[curves[0].role]}", fontsize=9)
    axes.set_ylabel("indirect effect" + (f", {_of(len(curves))}" if len(curves) > 1 else ""), fontsize=9)
    axes.legend(fontsize=8)
    if len(curves) == 1:
        (title,), fonts = _shown([f"{curves[0].prompt} …{curves[0].answer}"])
        axes.set_title(title, fontsize=8, fontfamily=fonts)
    return figure


def neurons(found: Neurons) -> Figure:
    """The neurons of a fact by layer: how many are coarse in any prompt, and the attribution of each, the chosen ones ringed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(max(5.0, 2.6 + 0.16 * found.n_layers), 4.0), dpi=150, layout="constrained")
    counts, attribution = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    layers = range(found.n_layers)
    counts.bar(layers, [sum(each.layer == layer for each in found.coarse) for layer in layers], color="C2", width=0.8)
    counts.set_ylabel("coarse neurons", fontsize=9)
    for name, own, look in (
        ("coarse", [each for each in found.coarse if each not in found.chosen], {"color": "C2", "alpha": 0.5, "s": 12}),
        ("chosen", found.chosen, {"facecolors": "none", "edgecolors": "C3", "s": 45, "linewidths": 1.4}),
    ):
        attribution.scatter([each.layer for each in own], [each.attribution for each in own], label=name, **look)
    attribution.axhline(0, color="black", linewidth=0.6)
    attribution.xaxis.set_major_locator(MaxNLocator(integer=True))
    attribution.set_xlim(-0.6, found.n_layers - 0.4)
    attribution.set_xlabel("layer", fontsize=9)
    attribution.set_ylabel(f"attribution, mean of {len(found.prompts)} prompts", fontsize=9)
    attribution.legend(fontsize=8)
    (title,), fonts = _shown([f"{found.prompt} …{found.answer}"])
    counts.set_title(title, fontsize=9, fontfamily=fonts)
    return figure


def write(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG; the same figure gives the same bytes.

    Raises:
        WriteError: the folder cannot be written.
    """
    import matplotlib as mpl

    written = []
    for suffix in (".png", ".svg"):
        path = stem.with_name(stem.name + suffix)
        metadata = {"Software": "mechedit"} if suffix == ".png" else {"Date": None, "Creator": "mechedit"}
        with atomic_write(path) as temporary, mpl.rc_context({"svg.hashsalt": "mechedit"}):
            figure.savefig(temporary, metadata=metadata)
        written.append(path)
    return written


def save(trace: Trace, folder: str | Path) -> list[Path]:
    """Write every kind's heat map into `folder`; the paths, in order."""
    return [path for kind in trace.effects for path in write(heat_map(trace, kind), Path(folder) / f"trace_{kind}")]


def save_average(mean: Average, folder: str | Path) -> list[Path]:
    """Write every kind's average map and the lines by role into `folder`; the paths, in order."""
    maps = [path for kind in mean.indirect for path in write(average_map(mean, kind), Path(folder) / f"average_{kind}")]
    return [*maps, *write(role_lines(mean), Path(folder) / "average_lines")]


def save_severed(curves: Sequence[Severed], folder: str | Path) -> list[Path]:
    """Write the severed curves into `folder`; the paths."""
    return write(severed_lines(curves), Path(folder) / "severed")


def save_neurons(found: Neurons, folder: str | Path) -> list[Path]:
    """Write the picture of a fact's neurons into `folder`; the paths."""
    return write(neurons(found), Path(folder) / "neurons")


def training_curves(log: Sequence[Mapping[str, float]], title: str) -> Figure:
    """What the training of an editor came to, step by step: the loss of edits, the divergence elsewhere, and success; on validation
    examples, and dashed on those trained on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.0), dpi=150, layout="constrained")
    figure.suptitle(_plain(title))
    labels = {"edit": "-log p of the target", "locality": "KL divergence elsewhere", "success": "says the target"}
    steps = [each["step"] for each in log]
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        axes.plot(steps, [each[name] for each in log], color="tab:blue", label="validation")
        axes.plot(steps, [each[f"training_{name}"] for each in log], "--", color="tab:gray", label="training")
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(bottom=0, top=1.02 if name == "success" else None)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure


def kind_title(kind: str, window: int) -> str:
    """What is restored in a picture of a kind, with its window."""
    return TITLES.get(kind, f"Restoring {kind} in a window of {{window}}").format(
        window=f"{window} layer{'s' if window > 1 else ''}"
    )


def _of(n: int) -> str:
    """How many facts, and whether these are too few for intervals."""
    from mechedit.statistics import FEWEST

    return f"{n} facts" + (" (too few for intervals)" if n < FEWEST else "")


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is, dollar signs included."""
    return text.replace("$", r"\$")


def _shown(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts as matplotlib can show them, and the fonts that have their letters: the usual ones first, then such as are installed.
    Letters that no font has are written as their codes, and a warning says so."""
    import matplotlib as mpl
    from matplotlib.font_manager import FontProperties, findfont, fontManager
    from matplotlib.ft2font import FT2Font

    fonts, usual = list(mpl.rcParams["font.family"]), FT2Font(findfont(FontProperties()))
    lacking = {letter for text in texts for letter in text if not usual.get_char_index(ord(letter))}
    upright = [each for each in fontManager.ttflist if each.style == "normal" and str(each.weight) in ("400", "normal")]
    for entry in sorted(upright, key=lambda each: each.name) if lacking else ():
        if entry.name.startswith("Last Resort"):  # draws boxes for all
            continue
        with suppress(OSError, RuntimeError):  # of a font that is gone, or damaged
            font = FT2Font(entry.fname)
            if has := {letter for letter in lacking if font.get_char_index(ord(letter))}:
                fonts.append(entry.name)
                lacking -= has
    if lacking:
        warnings.warn(
            f"no installed font has {len(lacking)} of a picture's characters, which are shown as their codes; install one of "
            "their script (Noto Sans CJK has Chinese, Japanese and Korean).",
            FigureWarning,
            stacklevel=3,
        )
    codes = str.maketrans({letter: letter.encode("unicode_escape").decode() for letter in lacking})
    return [_plain(text.translate(codes)) for text in texts], fonts
