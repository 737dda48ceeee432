"""ROME: rewrite a fact by a rank-one change of one MLP's `W_out` (Meng et al. 2022, section 3.1).

    k* = the subject's key, averaged over prefixes          mechedit.keys
    v* = the value that makes the model say the target      mechedit.values
    C  = the second moment of keys on text                  mechedit.moments
    W_out += outer(C^-1 k*, v* - (k* W_out + b_out)) / (k* C^-1 k*)        mechedit.rank_one

Which key is meant where is a setting, for published implementations differ: whose key gives the direction C^-1 k (`direction`), whose
key returns v* (`inserted`), how much of the change of the value each prefix sees while v* is sought (`shares`), and when that ends
(`stop`). `settings.POLICIES` has the combinations that have names.

Several prompts about one subject are one key and one v* that answers them all. Facts about several subjects have a key and a v* each,
and are written together by the least change under which every key returns its own value (`rank_one.insert_many`).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import applying, editing, guards, keys, models, moments, rank_one, values
from mechedit.cache import content_key
from mechedit.editing import Editor, Found, State
from mechedit.editors.aims import Aim, Begun, asked_of, by_subject, check_learnt, chosen_of, shares_of
from mechedit.edits import Edit, EditError
from mechedit.errors import check_list
from mechedit.facts import Fact
from mechedit.guards import Band
from mechedit.models import HookedModel
from mechedit.moments import Fisher, Moment
from mechedit.progress import Progress, silent
from mechedit.settings import MomentSettings, RomeSettings, SettingsError

__all__ = ["Prepared", "Rome", "check_fisher", "check_moment", "edit", "fisher_of", "prepare", "resolve"]

BANDS: dict[str, Band] = {
    "cond_C": (0.0, 1e12, "C^-1 k* would be noise; estimate C from more keys, or add a ridge"),
    "divisor_share": (
        0.05,
        float("inf"),
        "the keys of direction and insertion disagree, and such an edit breaks the model; use one key for both",
    ),
}


@dataclass(frozen=True)
class Prepared:
    """C, its ridge added, and the prefixes: "" and sampled ones. `estimated` is C as it was before. G (`moments.fisher`) where the settings
    weigh it.

    Raises:
        EditError: "", the bare prompt's, is not among the prefixes.
    """

    moment: Moment
    prefixes: tuple[str, ...]
    estimated: Moment
    fisher: Fisher | None = None

    def __post_init__(self) -> None:
        if "" not in self.prefixes:
            raise EditError(f'prefixes must have the bare prompt\'s, "", among them; found {list(self.prefixes)!r}.')

    @cached_property
    def key(self) -> str:
        """A digest of all."""
        return content_key(*self._hashes)

    @property
    def _hashes(self) -> tuple[str | tuple[str, ...], ...]:
        return (self.moment.hash, self.prefixes, *([self.fisher.hash] if self.fisher else []))

    @cached_property
    def made(self) -> dict[str, Any]:
        """What the latest edit made from C that the next one can use; it stays here when this is sent to a worker."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "made"}


def prepare(
    model: HookedModel,
    settings: RomeSettings,
    moment: Moment | None = None,
    prefixes: Sequence[str] | None = None,
    *,
    fisher: Fisher | None = None,
    progress: Progress = silent,
) -> Prepared:
    """What all edits share, for settings as `resolve` gives them.

    Without `moment`, C is estimated from text sampled from the model, once, and kept in the cache; so is G without `fisher`, where the
    settings weigh it. `prefixes`, "" among them, stand before the prompt in place of those that the settings sample.

    Raises:
        EditError: C or G does not belong to the model, layer or settings, or the prefixes lack the bare prompt's.
    """
    check_list("prefixes", prefixes)
    if moment is not None:
        check_moment(model, moment, settings)
    if fisher is not None:
        check_fisher(model, fisher, settings)
    windows = MomentSettings(prepend_bos=settings.prepend_bos)
    found = (
        moment if moment is not None else moments.estimate(model, settings.layer, settings=windows, progress=progress)
    )
    before = keys.prefixes(model, settings) if prefixes is None else tuple(prefixes)
    C = rank_one.regularised(found.C, settings.ridge)
    ready = replace(found, C=C, cond=moments.condition(C)) if settings.ridge else found
    before = tuple(sorted(before, key=bool))  # the bare prompt first, the others in their order
    weighed = fisher if fisher is not None and settings.fisher else fisher_of(model, settings, progress=progress)
    return Prepared(ready, before, found, weighed)


def fisher_of(model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> Fisher | None:
    """G of the layer, where the settings weigh it."""
    windows = MomentSettings(prepend_bos=settings.prepend_bos)
    return moments.fisher(model, settings.layer, settings=windows, progress=progress) if settings.fisher else None


class Rome(Editor):
    """ROME as an editor."""

    name = "rome"
    settings: ClassVar[type[RomeSettings]] = RomeSettings
    bands: ClassVar[ChainMap[str, Band]] = ChainMap(BANDS, guards.BANDS)
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"clamp": (0.5, 0.75, 1.0, 2.0, 4.0), "learning_rate": (0.5,)}

    strength = "clamp"

    def harmful(self, settings: RomeSettings) -> dict[str, tuple[str, RomeSettings]]:
        hard = replace(settings, clamp=8 * settings.clamp)
        mixed = replace(hard, direction="averaged", inserted="prompt", shares="whole", stop="published")
        return {"mixture of two keys": ("rome", mixed), "C = 1": ("rome-identity", hard)}

    @property
    def of(self) -> str:
        return "rome"  # of which the controls are variants

    def resolve(self, model: HookedModel, settings: RomeSettings | None = None) -> RomeSettings:
        resolved: RomeSettings = super().resolve(model, settings)
        models.mlp_module(model, resolved.layer)
        return resolved

    def prepare(self, model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> Prepared:
        return prepare(model, settings, progress=progress)

    def ahead(
        self, model: HookedModel, settings: RomeSettings, layers: Sequence[int], *, progress: Progress = silent
    ) -> None:
        windows = MomentSettings(prepend_bos=settings.prepend_bos)
        moments.estimate_layers(model, layers, settings=windows, progress=progress)

    def check(
        self, model: HookedModel, facts: Sequence[Fact], settings: RomeSettings, prepared: Prepared | None
    ) -> None:
        if prepared is not None:
            check_moment(model, prepared.estimated, settings)
            check_fisher(model, prepared.fisher, settings)
        if len({fact.subject for fact in facts}) > 1 and settings.direction != settings.inserted:
            raise SettingsError(
                "facts about several subjects are written together along the keys that return their values; give direction and "
                f"inserted the same key (found {settings.direction} and {settings.inserted}), or edit the facts one by one."
            )
        for fact in facts:  # whether each has such a token
            keys.contexts(model, fact, ("",), settings.fact_token, prepend_bos=settings.prepend_bos)

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: RomeSettings,
        prepared: Prepared,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        aims = self.aims(model, facts, settings, prepared, progress=progress)
        W_out = models.W_out(model, settings.layer).detach().float().cpu()
        b_out = models.b_out(model, settings.layer).float().cpu()
        stacked = {name: torch.stack([getattr(aim, name) for aim in aims]) for name in ("u", "key", "value")}
        if len(aims) == 1:
            written: Sequence[rank_one.RankOneEdit] = (
                rank_one.insert(settings.layer, W_out, b_out, aims[0].u, aims[0].key, aims[0].value),
            )
        else:
            written = rank_one.insert_many(settings.layer, W_out, b_out, stacked["u"], stacked["key"], stacked["value"])
        return Found(
            written,
            _report(aims, written, prepared),
            details(aims, prepared),
            {"k*": stacked["key"].squeeze(0), "v*": stacked["value"].squeeze(0)},
        )

    def aims(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: RomeSettings,
        prepared: Prepared,
        *,
        progress: Progress = silent,
    ) -> list[Aim]:
        """Key and value of each subject, in the order in which the facts name them; the values are sought together."""
        begun = self.begun(model, facts, settings, prepared)
        (parts,) = {each.parts for each in begun}
        sought = [each.sought for each in begun]
        G = prepared.fisher.relative if prepared.fisher else None
        found = values.optimise_all(model, sought, settings.layer, settings, parts, G=G, progress=progress)
        check_learnt([each.facts[0] for each in begun], found, settings)
        return [each.aim(value) for each, value in zip(begun, found, strict=True)]

    def begun(
        self, model: HookedModel, facts: Sequence[Fact], settings: RomeSettings, prepared: Prepared
    ) -> list[Begun]:
        """Of each subject what its value is sought from; all keys are from one pass."""
        every = by_subject(facts)
        asked = [asked_of(model, own, settings, prepared.prefixes) for own in every]
        found = keys.subject_keys(model, settings.layer, tuple(row for each in asked for row in each.contexts)).cpu()
        of_each = found.split([len(each.contexts) for each in asked])
        pairs = [self._keys(own[:-1], settings, prepared) for own in of_each]
        us = prepared.moment.solve(torch.stack([along for along, _ in pairs]))
        W_out = models.W_out(model, settings.layer).detach().float().cpu()
        b_out = models.b_out(model, settings.layer).float().cpu()
        begun = []
        for own, each, found, u, (along, key) in zip(every, asked, of_each, us, pairs, strict=True):
            parts, initial = self.parts(model, each.rows, key @ W_out + b_out, settings, prepared)
            shares, chosen = shares_of(found, u, key, settings), chosen_of(len(each.rows), prepared.prefixes, settings)
            rows, wanted = [each.rows[index] for index in chosen], [each.wanted[index] for index in chosen]
            sought = values.Sought(rows, each.essence, wanted, initial, shares[[*chosen, -1]])
            begun.append(Begun(tuple(own), along, u, key, each.rows, parts, sought))
        return begun

    def _keys(
        self, rows: Float[Tensor, "rows d_mlp"], settings: RomeSettings, prepared: Prepared
    ) -> tuple[Float[Tensor, " d_mlp"], Float[Tensor, " d_mlp"]]:
        """Of the keys of a subject's rows: the one that gives the direction, and the one that returns v*."""
        bare = rows[prepared.prefixes.index("") :: len(prepared.prefixes)]
        candidates = {"averaged": self.averaged(rows, bare, settings), "prompt": bare.mean(0)}
        return candidates[settings.direction], candidates[settings.inserted]

    def averaged(
        self, rows: Float[Tensor, "n d_mlp"], bare: Float[Tensor, "m d_mlp"], settings: RomeSettings
    ) -> Float[Tensor, " d_mlp"]:
        """The key of contexts, of which some are bare prompts."""
        return rows.mean(0)

    def parts(
        self,
        model: HookedModel,
        rows: Sequence[keys.Context],
        value: Float[Tensor, " d_model"],
        settings: Any,
        prepared: Prepared,
    ) -> tuple[tuple[str, ...], Float[Tensor, "*parts d_model"]]:
        """Which parts of the block are changed while v* is sought, the one that is written last, and what they give now; `value` is what the
        key returns."""
        return ("mlp",), value


def _report(aims: Sequence[Aim], written: Sequence[rank_one.RankOneEdit], prepared: Prepared) -> dict[str, float]:
    """The numbers of an edit; of several, the smallest divisor share."""
    shares = [float(aim.u @ aim.key.double()) / float(aim.u @ aim.direction.double()) for aim in aims]
    report = {"divisor": written[0].divisor} if len(aims) == 1 else {}
    return report | {"divisor_share": min(shares), "cond_C": prepared.moment.cond}


def details(aims: Sequence[Aim], prepared: Prepared) -> dict[str, Any]:
    """What an edit was made from; of several subjects, lists of lists."""
    losses, shares = ([list(map(list, aim.losses)) for aim in aims], [list(aim.shares) for aim in aims])
    moment, fisher = prepared.estimated, prepared.fisher
    return ({"fisher": {"source": fisher.source, "tokens": fisher.tokens, "hash": fisher.hash}} if fisher else {}) | {
        "prefixes": list(prepared.prefixes),
        "losses": losses[0] if len(aims) == 1 else losses,
        "shares": shares[0] if len(aims) == 1 else shares,
        "moment": {
            "hash": moment.hash,
            "source": moment.source,
            "keys": moment.keys,
            "settings": asdict(moment.settings),
            "origin": moment.origin,
        },
    }


def resolve(model: HookedModel, settings: RomeSettings | None = None) -> RomeSettings:
    """`Rome.resolve`: the settings with layer and BOS filled in; errors as there."""
    return Rome().resolve(model, settings)


def edit(
    model: HookedModel,
    fact: Fact | Sequence[Fact],
    settings: RomeSettings | None = None,
    moment: Moment | None = None,
    *,
    prefixes: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Edit:
    """`editing.edit` by ROME, with C or prefixes of one's own (`prepare`); errors as there."""
    if moment is None and prefixes is None:
        return editing.edit(model, fact, Rome(), settings, progress=progress)
    settings = resolve(model, settings)
    if moment is not None:
        check_moment(model, moment, settings)
    given = prepare(model, settings, moment, prefixes, progress=progress)
    return editing.edit(model, fact, Rome(), settings, prepared=given, progress=progress)


def check_fisher(model: HookedModel, fisher: Fisher | None, settings: RomeSettings) -> None:
    """Raise unless G is there where the settings weigh it, of the layer, and of the model as it is now, or without the edits that stand in it, the layer's
    own W_out aside.

    Raises:
        EditError: it is not.
    """
    if not settings.fisher:
        return
    if fisher is None or fisher.layer != settings.layer or not _belongs(model, fisher):
        found = "there is none" if fisher is None else f"this one is of layer {fisher.layer} of {fisher.origin['name']}"
        raise EditError(
            f"fisher = {settings.fisher:g} weighs G of layer {settings.layer} of the model as it is; {found}. Prepare anew (editors.rome.prepare)."
        )
    if fisher.settings.parts != 1:
        raise EditError(
            f"G is part {fisher.settings.part} of {fisher.settings.parts} of a text; estimate it of the whole."
        )
    _check_bos("G", "slopes", fisher.settings.prepend_bos, settings.prepend_bos)


def check_moment(model: HookedModel, moment: Moment, settings: RomeSettings) -> None:
    """Raise unless C is of the layer, and of keys as the model has them now, or without the edits that stand in it, for settings as
    `resolve` gives them.

    An edit of the layer's own `W_out` leaves its keys as they were, and C with them.

    Raises:
        EditError: it is not.
    """
    layer, d_mlp = settings.layer, models.W_out(model, settings.layer).shape[0]
    if not isinstance(moment, Moment):
        raise EditError(
            f"C is given as a Moment (moments.estimate, Moment.load, moments.read_published); found a {type(moment).__name__}."
        )
    for holds, message in (
        (moment.layer == layer, f"C must be of the edited layer {layer}; this one is of layer {moment.layer}. Estimate it for layer {layer}."),
        (moment.C.shape == (d_mlp, d_mlp), f"C must be [d_mlp, d_mlp] with d_mlp = {d_mlp}; it is {list(moment.C.shape)}, of another model."),
        (bool(moment.C.isfinite().all()), "C must be finite, but it holds NaN or infinity. Estimate it again; in float16, load the model in float32."),
        (moment.settings.parts == 1, f"C is part {moment.settings.part} of {moment.settings.parts} of a text; put all together with moments.merge (`mechedit merge`)."),
        (moment.keys > d_mlp, f"C must come from more keys than d_mlp = {d_mlp}; this one has {moment.keys}. Ten times d_mlp is a good number."),
        (_belongs(model, moment), f"C was estimated on other weights ({moment.origin['name']}). Estimate it on this model."),
    ):  # fmt: skip
        if not holds:
            raise EditError(message)
    _check_bos("C", "keys", moment.settings.prepend_bos, settings.prepend_bos)


def _belongs(model: HookedModel, found: Moment | Fisher) -> bool:
    """Whether C or G is of the model as it is now, or without the edits that stand in it, as `editing.make_ready` makes them."""
    if found.is_of(model):
        return True
    with applying.underneath(model):
        return found.is_of(model)


def _check_bos(of: str, what: str, its: bool | None, own: bool | None) -> None:
    if its not in (None, own):
        raise EditError(
            f"{of} was estimated {'with' if its else 'without'} BOS, and the edit reads its prompts {'with' if own else 'without'} it: {what} of the two "
            "differ. Give both the same prepend_bos."
        )
