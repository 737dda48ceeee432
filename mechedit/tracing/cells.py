"""What a corrupted-with-restoration run puts back: components, patches, cells, windows.

A patch names one activation: a component of a block at a position, whole or in part. A cell is one run: some patches are
restored to their clean values, others may be held at their corrupted ones, which severs the paths through them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mechedit import models, prompts
from mechedit.models import HookedModel
from mechedit.settings import SettingsError, TraceSettings

__all__ = ["ATTN_OUT", "COMPONENTS", "MLP_OUT", "POST", "RESID_MID", "RESID_POST", "RESID_PRE", "STATES", "WINDOWED", "Cell", "Component", "Patch", "Z", "check_index", "resolve", "restored_blocks", "single", "window"]  # fmt: skip


@dataclass(frozen=True)
class Component:
    """An activation that every block has, by its hook point: `hook` holds `{layer}`.

    `enters` is for the residual stream between blocks: 0 if it enters its own block, 1 if it enters the next one. What
    lies inside a block leaves it None. Any hook point whose activation is [row, position, ...] can be a component.
    """

    name: str
    hook: str
    enters: int | None = None

    def __post_init__(self) -> None:
        if "{layer}" not in self.hook:
            raise SettingsError(
                f"the hook of a component must hold {{layer}}, which every block fills in; it is {self.hook!r}."
            )

    def at(self, layer: int) -> str:
        """The name of the hook point in one block."""
        return self.hook.format(layer=layer)


RESID_PRE = Component("resid_pre", "blocks.{layer}.hook_resid_pre", enters=0)
RESID_POST = Component("resid_post", "blocks.{layer}.hook_resid_post", enters=1)
RESID_MID = Component("resid_mid", "blocks.{layer}.hook_resid_mid")
MLP_OUT = Component("mlp_out", "blocks.{layer}.hook_mlp_out")
ATTN_OUT = Component("attn_out", "blocks.{layer}.hook_attn_out")
Z = Component("z", "blocks.{layer}.attn.hook_z")
POST = Component("post", "blocks.{layer}.mlp.hook_post")
COMPONENTS = {each.name: each for each in (RESID_PRE, RESID_MID, RESID_POST, MLP_OUT, ATTN_OUT, Z, POST)}
STATES = {"resid": RESID_POST, "resid_pre": RESID_PRE, "resid_mid": RESID_MID}  # kinds that restore one state
WINDOWED = {"mlp": MLP_OUT, "attn": ATTN_OUT}  # kinds that restore the outputs of several blocks


@dataclass(frozen=True)
class Patch:
    """One activation. `index` picks a part of it: heads of `z` (one a query head, so grouped-query models have as many
    as `n_heads`), neurons of `post`, dimensions of a state or an output. None means all of it."""

    component: Component
    layer: int
    position: int
    index: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.component, Component):
            names = ", ".join(each.name.upper() for each in COMPONENTS.values())
            raise SettingsError(f"a patch is of a Component, one of {names} in mechedit.tracing.cells or your own; found {self.component!r}.")  # fmt: skip

    @property
    def start(self) -> int:
        """The first block that must be computed for it."""
        return self.layer + (self.component.enters or 0)


@dataclass(frozen=True)
class Cell:
    """One run: patches `restored` to the clean run's values, others `held` at the corrupted run's."""

    restored: tuple[Patch, ...]
    held: tuple[Patch, ...] = ()

    def __post_init__(self) -> None:
        if not self.restored:
            raise ValueError("a cell must restore something; without it the run is the corrupted one.")


def check_index(patch: Patch, width: int | None) -> None:
    """Raise where a patch picks parts that its activation, of so many, has not.

    Raises:
        ModelError: it does.
    """
    if patch.index and width is not None and not (min(patch.index) >= 0 and max(patch.index) < width):
        raise models.ModelError(f"the index of a patch of {patch.component.name} must be from 0 to {width - 1}; found {', '.join(map(str, patch.index))}.")  # fmt: skip


def window(layer: int, width: int, n_layers: int, centre: str = "code") -> range:
    """The blocks restored around `layer`, cut to the model.

    The published code takes [layer - w//2, layer + ceil(w/2) - 1]; the paper's text (appendix B.2) has even windows one
    block higher: [layer - ceil(w/2) + 1, layer + w//2]. Windows of odd width are the same in both.
    """
    first = layer - width // 2 if centre == "code" else layer - (width + 1) // 2 + 1
    return range(max(0, first), min(n_layers, first + width))


def restored_blocks(kind: str, layer: int, n_layers: int, settings: TraceSettings) -> range:
    """The blocks that a cell of a kind restores at `layer`: that one of a state, a window of anything else."""
    return range(layer, layer + 1) if kind in STATES else window(layer, settings.window, n_layers, settings.centre)


def single(
    component: Component,
    layers: Iterable[int] | int,
    positions: Iterable[int] | int,
    index: tuple[int, ...] | None = None,
) -> Cell:
    """A cell that restores one component, in some blocks, at some positions."""
    layers = [layers] if isinstance(layers, int) else layers
    positions = [positions] if isinstance(positions, int) else list(positions)
    return Cell(tuple(Patch(component, layer, position, index) for layer in layers for position in positions))


def resolve(model: HookedModel, settings: TraceSettings | None = None) -> TraceSettings:
    """The settings with what is left to the model filled in: BOS, and the window, which is the preset's, else ten layers."""
    settings, preset = settings or TraceSettings(), models.preset(model)
    if not isinstance(settings, TraceSettings):
        raise SettingsError(f"a trace takes TraceSettings; found {type(settings).__name__}.")
    size = settings.window or (preset.window if preset else 10)
    return replace(settings, prepend_bos=prompts.resolve_bos(model, settings.prepend_bos), window=size)
