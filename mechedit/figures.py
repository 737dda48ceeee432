"""Pictures of traces: the paper's heat maps, one a kind, as PNG and SVG. No model is needed, and no window opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mechedit.cache import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mechedit.tracing import Trace

__all__ = ["heat_map", "save"]

COLOURS = {"resid": "Purples", "mlp": "Greens", "attn": "Reds"}
TITLES = {
    "resid": "Restoring one state after corrupted input",
    "mlp": "Restoring MLP outputs in a window of {window} layers",
    "attn": "Restoring attention outputs in a window of {window} layers",
}
AXES = {
    "resid": "layer of the restored state",
    "mlp": "layer at the centre of the restored MLP outputs",
    "attn": "layer at the centre of the restored attention outputs",
}


def heat_map(trace: Trace, kind: str) -> Figure:
    """P(answer) by token and layer for one kind, subject tokens starred (Meng et al. 2022, figure 1).

    The colours run from the corrupted probability, which is white, to the highest restored one.
    """
    from matplotlib.figure import Figure

    if kind not in trace.effects:
        raise ValueError(f"the trace has kinds {', '.join(trace.effects)}, not {kind}.")
    grid = trace.effects[kind].T.numpy()
    begin, end = trace.subject_range
    labels = [
        token.replace("\n", "⏎") + ("*" if begin <= index < end else "") for index, token in enumerate(trace.tokens)
    ]
    figure = Figure(figsize=(3.2 + 0.16 * grid.shape[1], 1.6 + 0.21 * grid.shape[0]), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        grid,
        cmap=COLOURS[kind],
        vmin=min(trace.p_corrupted, grid.min()),
        vmax=grid.max(),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels], fontsize=9)
    axes.set_xticks(range(0, grid.shape[1], 1 if grid.shape[1] <= 12 else 5 if grid.shape[1] > 24 else 2))
    axes.set_xlabel(AXES[kind], fontsize=9)
    axes.set_title(TITLES[kind].format(window=trace.settings.window), fontsize=10)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.set_title(_plain(f"P({trace.answer.strip()})"), fontsize=9, pad=8)
    bar.ax.axhline(trace.p_corrupted, color="black", linewidth=0.8)
    if trace.p_clean <= grid.max():
        bar.ax.axhline(trace.p_clean, color="black", linewidth=0.8, linestyle="--")
    return figure


def save(trace: Trace, folder: str | Path) -> list[Path]:
    """Write every kind's heat map as PNG and SVG into `folder`; the paths, in order.

    Raises:
        WriteError: the folder cannot be written.
    """
    import matplotlib as mpl

    written = []
    for kind in trace.effects:
        figure = heat_map(trace, kind)
        for suffix in (".png", ".svg"):
            path = Path(folder) / f"trace_{kind}{suffix}"
            metadata = {"Software": "mechedit"} if suffix == ".png" else {"Date": None, "Creator": "mechedit"}
            with (
                atomic_write(path) as temporary,
                mpl.rc_context({"svg.hashsalt": "mechedit"}),
            ):  # same trace, same bytes
                figure.savefig(temporary, metadata=metadata)
            written.append(path)
    return written


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is, dollar signs included."""
    return text.replace("$", r"\$")
