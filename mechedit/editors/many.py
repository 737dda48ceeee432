"""Editors of many facts: keys and values as ROME finds them, and one solve a block (`mechedit.closed_form`).

    W_out += A^T (K A^T + slack I)^-1 R,    A = K M^-1,    M = a C + b P + c I

    memit       a = 15000, slack 1: residuals are met as far as 15,000 ordinary keys let them (Meng et al. 2023)
    emmet       a = 1, no slack: residuals are met exactly; with one fact it is ROME (Gupta et al. 2024)
    alphaedit   b = 1, c = 10, in the null space of C: earlier edits keep their values, C's large directions are not touched
                (Fang et al. 2025)
    pmet        a = 6000, slack 1: while v* is sought, the attention may change too, of which nothing is written (Li et al. 2024)
    sequential  b = 1, a = 5 d_mlp, slack a fifth of k M^-1 k, for long runs: C weighs so much that a fact is written with the least
                change of all else, and the small slack writes it all the same. After any number of edits W is what one solve for all of
                them gives (`mechedit.recursive`), and `mechedit.runs.sequence` keeps, resumes, watches and takes apart such runs

R is what the values v* are more than the keys return now. With `layers` it is spread over several blocks (`spread`), each with its own C.
In a sequence each edit hands on its keys, block by block, and P is the sum of k k^T over all of them. With it goes the factor of M where an
update brought it there, so that a run that goes on from its state solves with the same bits. What may be done to a change after the solve is
`mechedit.editors.shaping`.
"""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import applying, guards, keys, models, moments, weights
from mechedit.cache import content_key
from mechedit.closed_form import Metric
from mechedit.editing import EditWarning, Found, State
from mechedit.editors import earlier, rome, shaping, spread
from mechedit.editors.aims import Aim
from mechedit.editors.earlier import EARLIER, KEYS, metric_of, names_of, terms_of
from mechedit.editors.rome import BANDS, Prepared, Rome, details
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.guards import Band
from mechedit.models import HookedModel
from mechedit.moments import Fisher, Moment
from mechedit.progress import Progress, silent
from mechedit.settings import (
    AlphaEditSettings,
    EmmetSettings,
    MemitSettings,
    MomentSettings,
    PmetSettings,
    RomeSettings,
    SequentialSettings,
    SettingsError,
    given,
)
from mechedit.values import HOOKS

__all__ = ["EARLIER", "AlphaEdit", "Emmet", "Memit", "Pmet", "Sequential", "Stack", "prepare", "terms_of"]

ORDINARY = 5.0  # d_mlp is k C^-1 k of an ordinary key k, on average: so much more than such a key C weighs


@dataclass(frozen=True)
class Stack(Prepared):
    """What the last of several blocks needs, and the same for those `below` it, from the lowest."""

    below: tuple[Prepared, ...] = ()

    @cached_property
    def key(self) -> str:
        """A digest of all."""
        return content_key(*self._hashes, *(each.moment.hash for each in self.below))


def prepare(
    model: HookedModel,
    settings: MemitSettings,
    given: Sequence[Moment] = (),
    prefixes: Sequence[str] | None = None,
    *,
    fisher: Fisher | None = None,
    progress: Progress = silent,
) -> Prepared:
    """`rome.prepare` of one block, or of several: C of each, from the lowest, from one pass over the text where they are not given; G of the last.

    Raises:
        EditError: C or G does not belong to the model, block or settings, or the prefixes lack the bare prompt's.
    """
    layers = settings.blocks
    if not given:
        windows = MomentSettings(prepend_bos=settings.prepend_bos)
        found = moments.estimate_layers(model, layers, settings=windows, progress=progress)
        given = [found[layer] for layer in layers]
    if len(given) != len(layers):
        raise EditError(f"C is needed of each of the blocks {layers}, from the lowest; found {len(given)}.")
    prefixes = keys.prefixes(model, settings) if prefixes is None else prefixes
    own = [
        rome.prepare(model, alone(settings, layer), moment, prefixes, fisher=G, progress=progress)
        for layer, moment, G in zip(layers, given, (*(None for _ in layers[1:]), fisher), strict=True)
    ]
    last = own[-1]
    return Stack(last.moment, last.prefixes, last.estimated, last.fisher, tuple(own[:-1])) if own[1:] else last


def alone(settings: MemitSettings, layer: int) -> MemitSettings:
    """The settings of an edit of this block alone; of one below the last, where no v* is sought, without G."""
    fisher = settings.fisher if layer == settings.layer else 0.0
    return replace(settings, layer=layer, layers=(), portions=(), fisher=fisher)


class Memit(Rome):
    """MEMIT at one layer, as an editor."""

    name = "memit"
    settings: ClassVar[type[MemitSettings]] = MemitSettings
    bands: ClassVar[ChainMap[str, Band]] = ChainMap({"cond_C": BANDS["cond_C"]}, guards.BANDS)

    def harmful(self, settings: RomeSettings) -> dict[str, tuple[str, RomeSettings]]:
        """None of its own."""
        return {}

    def defaults(self, model: HookedModel) -> Any:
        """The model's preset for this editor, else that for ROME."""
        preset = models.preset(model)
        return preset.settings[self.name] if preset and self.name in preset.settings else super().defaults(model)

    def resolve(self, model: HookedModel, settings: Any = None) -> Any:
        """As every editor does it; of several blocks `layer` is the last. One block in `layers` is `layer`.

        Raises:
            SettingsError: `layer` and `layers` contradict each other.
        """
        own = given(settings) if isinstance(settings, self.settings) else {}
        if own.get("layers"):
            if own.get("layer", -1) not in (-1, settings.layers[-1]):
                raise SettingsError(
                    f"layer is the last of layers, where v* is sought; found layer {settings.layer} and layers {settings.layers}. Give one of the two."
                )
            settings = replace(settings, layer=settings.layers[-1])
        elif own.get("layer", -1) != -1:  # that block alone, whatever the preset has
            settings = replace(settings, layers=(), portions=())
        chosen: Any = super().resolve(model, settings)
        for layer in chosen.layers:
            models.mlp_module(model, layer)
        return chosen if chosen.layers[1:] else alone(chosen, chosen.layer)

    def joined(self, state: State, new: State, settings: Any = None, prepared: Any = None) -> State:
        """The sum of k k^T over the keys of all edits so far, of each block, and the factor of M with them where it was updated."""
        return earlier.grown(state, new, settings, None if prepared is None else _ready(prepared))

    def prepare(self, model: HookedModel, settings: Any, *, progress: Progress = silent) -> Prepared:
        return prepare(model, settings, progress=progress)

    def check(
        self, model: HookedModel, facts: Sequence[Fact], settings: RomeSettings, prepared: Prepared | None
    ) -> None:
        assert isinstance(settings, MemitSettings)
        super().check(model, facts, settings, None if settings.layers else prepared)
        if not settings.layers or prepared is None:
            return
        own = _ready(prepared)
        if len(own) != len(settings.layers):
            raise EditError(
                f"C is needed of each of the blocks {settings.layers}; found {len(own)}. editors.many.prepare makes them."
            )
        with applying.underneath(
            model
        ):  # what stands in a block changes the keys of those above, and C stays as it was
            for layer, each in zip(settings.layers, own, strict=True):
                rome.check_moment(model, each.estimated, alone(settings, layer))
                rome.check_fisher(model, each.fisher, alone(settings, layer))

    def averaged(
        self, rows: Float[Tensor, "n d_mlp"], bare: Float[Tensor, "m d_mlp"], settings: RomeSettings
    ) -> Float[Tensor, " d_mlp"]:
        assert isinstance(settings, MemitSettings)
        if settings.average == "even" or len(rows) == len(bare):
            return super().averaged(rows, bare, settings)
        others = (rows.sum(0) - bare.sum(0)) / (len(rows) - len(bare))
        return (bare.mean(0) + others) / 2

    def parts(
        self,
        model: HookedModel,
        rows: Sequence[keys.Context],
        value: Float[Tensor, " d_model"],
        settings: Any,
        prepared: Prepared,
    ) -> tuple[tuple[str, ...], Float[Tensor, "*parts d_model"]]:
        parts, layer = settings.parts, settings.layer
        if parts == ("mlp",):
            return parts, value
        weighed = _averages(rows, settings, prepared).wanted
        names = [HOOKS[part].format(layer) for part in parts if part in HOOKS]
        *found, post = (
            weighed @ each for each in spread.read_at(model, [*names, f"blocks.{layer}.mlp.hook_post"], layer, rows)
        )
        now = [*found, spread.outputs(model, layer, post[None])[0]][: len(parts)]
        return parts, torch.stack(now).float() if len(parts) > 1 else now[0].float()

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: Any,
        prepared: Prepared,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        aims = self.aims(model, facts, settings, prepared, progress=progress)
        ready, names, first = _ready(prepared), names_of(settings), shaping.unedited(model, settings)
        metrics = [metric_of(own, settings, state, name) for own, name in zip(ready, names, strict=True)]
        if settings.layers:
            written, total = _spread(model, aims, settings, prepared, metrics, first)
        else:
            written, total = [_write(model, aims, settings, metrics[0], first.get(settings.layer))], None
        survive = [own.survives(each.keys) for own, each in zip(metrics, written, strict=True)]
        report = {
            "met": written[-1].met if total is None else total,
            "survives": min(float(each.min()) for each in survive),
            "cond_C": max(own.moment.cond for own in ready),
        }
        if settings.null:
            report["null_rank"] = float(min(own.rank for own in metrics))
        told = details(aims, prepared) | _by_steps(settings, written) | _projections(settings, metrics, survive)
        if total is not None:
            report |= _by_block(settings.blocks, written)
            told |= _moments(ready)
        if line := shaping.unmet(report, settings):
            told["unmet"] = line
            warnings.warn(f"{self.name}: {line}", EditWarning, stacklevel=2)
        stacked = {
            name: torch.stack([getattr(aim, own) for aim in aims]) for name, own in (("k*", "key"), ("v*", "value"))
        }
        return Found(
            [each.change for each in written],
            report,
            told,
            {name: each.float().squeeze(0) for name, each in stacked.items()},
            {KEYS + name: each.keys.float() for name, each in zip(names, written, strict=True)} if settings.b else {},
        )


class Emmet(Memit):
    """EMMET as an editor."""

    name = "emmet"
    settings: ClassVar[type[EmmetSettings]] = EmmetSettings


class Pmet(Memit):
    """PMET as an editor."""

    name = "pmet"
    settings: ClassVar[type[PmetSettings]] = PmetSettings

    def defaults(self, model: HookedModel) -> Any:
        return _own(self, super().defaults(model))


class AlphaEdit(Memit):
    """AlphaEdit as an editor."""

    name = "alphaedit"
    settings: ClassVar[type[AlphaEditSettings]] = AlphaEditSettings


class Sequential(Memit):
    """The default for long runs, as an editor."""

    name = "sequential"
    settings: ClassVar[type[SequentialSettings]] = SequentialSettings

    def defaults(self, model: HookedModel) -> Any:
        return _own(self, super().defaults(model))

    def resolve(self, model: HookedModel, settings: Any = None) -> Any:
        resolved = super().resolve(model, settings)
        d_mlp = models.W_out(model, resolved.layer).shape[0]
        return resolved if resolved.a or resolved.c else replace(resolved, a=ORDINARY * d_mlp)


def _own(editor: Memit, found: Any) -> Any:
    """The model's preset for this editor, else the editor's own constants with the layer, clamp and prefixes of that for ROME."""
    if isinstance(found, editor.settings):
        return found
    return editor.settings(**{name: getattr(found, name) for name in ("layer", "clamp", "prefixes")})


def _ready(prepared: Prepared) -> list[Prepared]:
    """What was prepared for each block, from the lowest."""
    return [*getattr(prepared, "below", ()), prepared]


def _averages(rows: Sequence[keys.Context], settings: MemitSettings, prepared: Prepared) -> spread.Averages:
    """How a subject's contexts are averaged."""
    bare = range(prepared.prefixes.index(""), len(rows), len(prepared.prefixes))
    return spread.averages(len(rows), bare, settings.average)


def _write(
    model: HookedModel,
    aims: Sequence[Aim],
    settings: MemitSettings,
    metric: Metric,
    first: Float[Tensor, "d_mlp d_model"] | None,
) -> spread.Written:
    """All of the change in one block."""
    own, wanted = (torch.stack([getattr(aim, name) for aim in aims]).double() for name in ("key", "change"))
    if settings.parts[-1] == "stream":
        now = spread.outputs(model, settings.layer, own)
        wanted = spread.through_norm(now, wanted, spread.weight_after(model, settings.layer))
    solved = metric.solve(settings.layer, own, wanted)
    change, did = shaping.shaped(solved, models.W_out(model, settings.layer), first, settings)
    return spread.Written(own, change, spread.met(spread.added_by(change, own), wanted), 1.0, did)


def _spread(
    model: HookedModel,
    aims: Sequence[Aim],
    settings: MemitSettings,
    prepared: Prepared,
    metrics: Sequence[Metric],
    first: Mapping[int, Float[Tensor, "d_mlp d_model"]],
) -> tuple[list[spread.Written], float]:
    """What was written in each block, and the share of all that was wanted that is there then; the model is put back."""
    subjects = [spread.Subject(aim.rows, _averages(aim.rows, settings, prepared), aim.change) for aim in aims]
    places = [weights.Weight(layer, "mlp.W_out") for layer in settings.layers]
    with weights.restored(model, *places) as originals:
        spreading = spread.Spread(model, subjects, settings)
        written = [
            spreading.write_(index, metric, originals[place], first.get(place.layer))
            for index, (metric, place) in enumerate(zip(metrics, places, strict=True))
        ]
        return written, spreading.met()


def _by_block(layers: Sequence[int], written: Sequence[spread.Written]) -> dict[str, float]:
    """The share of what each block was to add to the stream that it adds, and of all that was wanted what was left before it."""
    return {
        f"{name}.{layer}": getattr(each, name)
        for layer, each in zip(layers, written, strict=True)
        for name in ("met", "left")
    }


def _by_steps(settings: MemitSettings, written: Sequence[spread.Written]) -> dict[str, Any]:
    """What steps after the solve did, block by block."""
    if not settings.is_shaped:
        return {}
    return {"shaped": [{"layer": layer} | own.shaped for layer, own in zip(settings.blocks, written, strict=True)]}


def _projections(
    settings: MemitSettings, metrics: Sequence[Metric], survive: Sequence[Float[Tensor, " n"]]
) -> dict[str, Any]:
    """Of each block's null space its rank, and what share of each key's square is in it."""
    if not settings.null:
        return {}
    each = zip(settings.blocks, metrics, survive, strict=True)
    return {
        "projections": [
            {"layer": layer, "rank": metric.rank, "of": len(metric.C), "survives": shares.tolist()}
            for layer, metric, shares in each
        ]
    }


def _moments(ready: Sequence[Prepared]) -> dict[str, Any]:
    """By which C each block was written."""
    return {
        "moments": [{"layer": each.moment.layer, "hash": each.moment.hash, "keys": each.moment.keys} for each in ready]
    }
