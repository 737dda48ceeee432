"""What is known to suit a model: constants by model and editor, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mechedit.settings.editor import EditSettings
from mechedit.settings.editors import (
    AttentionEditSettings,
    BoundedSettings,
    FineTuningSettings,
    KnowledgeNeuronsSettings,
)
from mechedit.settings.many import (
    MANY_CONSTANTS,
    MANY_POLICIES,
    AlphaEditSettings,
    EmmetSettings,
    MemitSettings,
    PmetSettings,
    SequentialSettings,
)
from mechedit.settings.rome import RomeSettings

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Of one model: settings by editor, and where they come from; BOS; how many layers a window of a trace has.

    It is told by its shape (layers, width, vocabulary), and where it ships or is packaged by `marks`: number i of the embedding of
    token 10 (i + 1), which no other model of this shape has.
    """

    settings: Mapping[str, EditSettings]
    sources: Mapping[str, str]
    prepend_bos: bool
    shape: tuple[int, int, int]
    window: int = 10
    marks: tuple[float, ...] = ()

    @property
    def rome(self) -> RomeSettings:
        """Those of ROME, which every preset has."""
        own = self.settings["rome"]
        assert isinstance(own, RomeSettings)
        return own


_PAPER = "published code of Meng et al. 2022, hparams/ROME"
_PAPER_FT = "published code of Meng et al. 2022, hparams/FT"
_TUNED = "tuned here"


def _preset(rome: RomeSettings, source: str, shape: tuple[int, int, int]) -> Preset:
    return Preset({"rome": rome}, {"rome": source}, prepend_bos=False, shape=shape)


def _with(preset: Preset, source: str, **settings: EditSettings) -> Preset:
    """With settings of other editors, by their names (`_` for `-`), from one source."""
    own = {name.replace("_", "-"): each for name, each in settings.items()}
    return replace(
        preset, settings={**preset.settings, **own}, sources={**preset.sources, **dict.fromkeys(own, source)}
    )


def _tuned(rome: RomeSettings, shape: tuple[int, int, int], window: int, *marks: float) -> Preset:
    return Preset({"rome": rome}, {"rome": _TUNED}, prepend_bos=True, shape=shape, window=window, marks=marks)


def _organism(layer: int, clamp: float, *marks: float) -> Preset:
    return _tuned(RomeSettings(layer=layer, clamp=clamp, prefixes=((5, 5),)), (8, 192, 2048), 3, *marks)


def _spread(first: int, last: int, policy: str = "memit", **constants: float) -> dict[str, Any]:
    """Fields of an editor that spreads a change over these blocks, as published: the policy's, GPT-J's constants, and the model's own."""
    layers = {"layers": tuple(range(first, last + 1)), "layer": last}
    return layers | MANY_POLICIES[policy] | MANY_CONSTANTS[policy] | constants


def _spreading(preset: Preset, source: str, memit: dict[str, Any], pmet: dict[str, Any] | None = None) -> Preset:
    """With those of the editors of many facts: EMMET's at the layer of ROME's, AlphaEdit's as MEMIT's but for what a change is weighed by."""
    one = {name: value for name, value in memit.items() if name not in ("layers", "layer", "a")}
    found = _with(preset, source, memit=MemitSettings(**memit))
    if pmet:
        found = _with(found, _PAPER_PMET, pmet=PmetSettings(**pmet))
    if source != _PAPER_MEMIT:
        return found
    found = _with(found, _PAPER_EMMET, emmet=EmmetSettings(layer=preset.rome.layer, **one))
    return _with(found, _PAPER_ALPHA, alphaedit=AlphaEditSettings(**one, layers=memit["layers"], layer=memit["layer"]))


_PAPER_MEMIT = "published code of Meng et al. 2023 (MEMIT), hparams/MEMIT"
_PAPER_ALPHA = "published code of Fang et al. 2025 (AlphaEdit), hparams/AlphaEdit"
_PAPER_EMMET = "published code of Gupta et al. 2024 (EMMET), hparams/EMMET; residuals are met exactly here"
_PAPER_PMET = "published code of Li et al. 2024 (PMET), hparams/PMET"
_GPT2 = 50257
PRESETS: dict[str, Preset] = {
    "gemma-3-270m": _with(
        _with(
            _tuned(
                *(RomeSettings(layer=3, clamp=0.75), (18, 640, 262144), 10),
                *(-0.1274, 0.8815, -1.897, -0.177, -0.06466, 0.5111, 0.4969, -0.8539),
            ),
            _TUNED,
            ft=FineTuningSettings(layer=5, learning_rate=5e-5),
            ft_l=BoundedSettings(layer=6, learning_rate=1e-3, norm_bound=3e-4),
            attention_edit=AttentionEditSettings(layer=8, learning_rate=1e-3, norm_bound=2e-3),
            kn=KnowledgeNeuronsSettings(l2=8.0, prefixes=((5, 1), (10, 1))),  # three prompts for nine: less time
        ),
        "tried here, experiments/tuned_many and, of sequential, scaling",
        memit=MemitSettings(layer=3, clamp=0.75, a=400.0),
        emmet=EmmetSettings(layer=3, clamp=0.75),
        alphaedit=AlphaEditSettings(layer=3, clamp=0.75, c=1.0),
        pmet=PmetSettings(layer=3, clamp=0.75, a=400.0, stop="target"),  # by its own end p_new is 0.09 on average
        sequential=SequentialSettings(layer=3, clamp=0.75, fisher=40.0),  # for long runs: a single edit says little
    ),
    "organism": _with(
        _with(
            _organism(0, 1.0, 0.01538, -0.1711, -0.1093, -0.1405, 0.0322, -0.01921, 0.005695, -0.1536),
            _TUNED,
            ft=FineTuningSettings(layer=0, learning_rate=3e-4),
            ft_l=BoundedSettings(layer=0, learning_rate=2e-3, norm_bound=3e-3),
            attention_edit=AttentionEditSettings(layer=6, learning_rate=5e-3, norm_bound=3e-3),
            kn=KnowledgeNeuronsSettings(l2=2.0),
        ),
        "tried here, experiments/tuned_many",
        memit=MemitSettings(layer=0, clamp=1.0, prefixes=((5, 5),), a=150.0),
        pmet=PmetSettings(
            layer=0, clamp=1.0, prefixes=((5, 5),), a=150.0, stop="target", stop_at=1e-4, steps=100
        ),  # by its own end p_new is 0.46 on average
        emmet=EmmetSettings(layer=0, clamp=1.0, prefixes=((5, 5),)),
        alphaedit=AlphaEditSettings(layer=0, clamp=1.0, prefixes=((5, 5),), c=1.0),
    ),
    "organism-gptj": _with(
        _organism(0, 1.0, -0.01837, 0.005768, 0.01588, -0.0008025, -0.0119, 0.002666, 0.08032, 0.02974),
        _TUNED,
        ft=FineTuningSettings(layer=0, learning_rate=3e-4),
        ft_l=BoundedSettings(layer=0, learning_rate=2e-3, norm_bound=3e-3),
        attention_edit=AttentionEditSettings(layer=4, learning_rate=5e-3, norm_bound=1e-2),
        kn=KnowledgeNeuronsSettings(l2=2.0),
    ),
    "organism-llama": _with(
        _organism(2, 4.0, -0.0004182, 0.03528, 0.008438, 0.009552, 0.002386, -0.01697, 0.01717, -0.03113),
        _TUNED,
        ft=FineTuningSettings(layer=2, learning_rate=1e-3),
        ft_l=BoundedSettings(layer=2, learning_rate=2e-3, norm_bound=3e-2),
        attention_edit=AttentionEditSettings(layer=6, learning_rate=5e-3, norm_bound=1e-2),
        kn=KnowledgeNeuronsSettings(l2=4.0),  # the best within the bands, after which one fact in two is still not said
    ),
    "gpt2": _preset(
        RomeSettings(layer=4, clamp=3.0),
        "not published: layer at gpt2-medium's share of depth, clamp as there; not tuned",
        (12, 768, _GPT2),
    ),
    "gpt2-medium": _with(
        _preset(RomeSettings(layer=8, clamp=3.0), _PAPER, (24, 1024, _GPT2)),
        _PAPER_FT,
        ft_l=BoundedSettings(layer=0, learning_rate=5e-4, norm_bound=2e-3),
    ),
    "gpt2-large": _with(
        _preset(RomeSettings(layer=12), _PAPER, (36, 1280, _GPT2)),
        _PAPER_FT,
        ft_l=BoundedSettings(layer=0, learning_rate=5e-4, norm_bound=1e-3),
    ),
    "gpt2-xl": _spreading(
        _with(
            _preset(RomeSettings(layer=17), _PAPER, (48, 1600, _GPT2)),
            _PAPER_FT,
            ft=FineTuningSettings(layer=1, learning_rate=5e-4),
            ft_l=BoundedSettings(layer=0, learning_rate=5e-4, norm_bound=5e-4),
            attention_edit=AttentionEditSettings(layer=33, learning_rate=1e-3, norm_bound=1e-3),
        ),
        _PAPER_MEMIT,
        _spread(13, 17, steps=20, a=20000.0),
    ),
    "gpt-j-6b": _spreading(
        _with(
            _preset(RomeSettings(layer=5), _PAPER, (28, 4096, 50400)),
            _PAPER_FT,
            ft=FineTuningSettings(layer=21, learning_rate=5e-4),
            ft_l=BoundedSettings(layer=0, learning_rate=5e-4, norm_bound=5e-5),
        ),
        _PAPER_MEMIT,
        _spread(3, 8),
        _spread(3, 8, "pmet"),
    ),
    "gpt-neox-20b": _spreading(
        _preset(RomeSettings(layer=15), "published code of Meng et al. 2023 (MEMIT), hparams/ROME", (44, 6144, 50432)),
        "published code of Li et al. 2024 (PMET), hparams/MEMIT",
        _spread(6, 10, clamp=0.8, steps=20, a=6000.0),
        _spread(6, 10, "pmet", clamp=0.8, learning_rate=0.5, kl=0.8, a=15000.0),
    ),
}
