"""What is known to suit a model: constants by model and editor, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mechedit.settings.editors import EditSettings, FineTuningSettings, RomeSettings

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Of one model of so many layers: settings by editor, and where they come from; BOS; how many layers a window of a trace has."""

    settings: Mapping[str, EditSettings]
    sources: Mapping[str, str]
    prepend_bos: bool
    n_layers: int
    window: int = 10

    @property
    def rome(self) -> RomeSettings:
        """Those of ROME, which every preset has."""
        own = self.settings["rome"]
        assert isinstance(own, RomeSettings)
        return own


_PAPER = "published code of Meng et al. 2022, hparams/ROME"
_PAPER_FT = "published code of Meng et al. 2022, hparams/FT"
_TUNED = "tuned here; see experiments/README.md"


def _preset(rome: RomeSettings, source: str, n_layers: int, *, bos: bool = False, window: int = 10) -> Preset:
    return Preset({"rome": rome}, {"rome": source}, bos, n_layers, window)


def _with_ft(preset: Preset, layer: int) -> Preset:
    """With fine-tuning at its published layer, and the rest of its published constants, which are the defaults."""
    ft = FineTuningSettings(layer=layer)
    return replace(preset, settings={**preset.settings, "ft": ft}, sources={**preset.sources, "ft": _PAPER_FT})


def _organism(layer: int, clamp: float) -> Preset:
    rome = RomeSettings(layer=layer, clamp=clamp, prefixes=((5, 5),))
    return _preset(rome, _TUNED, 8, bos=True, window=3)


PRESETS: dict[str, Preset] = {
    "gemma-3-270m": _preset(RomeSettings(layer=3, clamp=0.75), _TUNED, 18, bos=True),
    "organism": _organism(layer=0, clamp=1.0),
    "organism-gptj": _organism(layer=0, clamp=1.0),
    "organism-llama": _organism(layer=2, clamp=4.0),
    "gpt2": _preset(
        RomeSettings(layer=4, clamp=3.0),
        "not published: layer at gpt2-medium's share of depth, clamp as there; not tuned",
        12,
    ),
    "gpt2-medium": _preset(RomeSettings(layer=8, clamp=3.0), _PAPER, 24),
    "gpt2-large": _preset(RomeSettings(layer=12), _PAPER, 36),
    "gpt2-xl": _with_ft(_preset(RomeSettings(layer=17), _PAPER, 48), layer=1),
    "gpt-j-6b": _with_ft(_preset(RomeSettings(layer=5), _PAPER, 28), layer=21),
    "gpt-neox-20b": _preset(RomeSettings(layer=15), "published code of Meng et al. 2023 (MEMIT), hparams/ROME", 44),
}
