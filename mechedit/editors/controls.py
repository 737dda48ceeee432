"""Controls: ROME with one of its parts taken out, to see what that part is worth. Each is an editor.

rome-identity       C = 1, as if every direction of keys were as common
rome-random-layer   another layer, drawn for the first fact of an edit by the settings' seed, with the clamp that suits that layer
rome-random-key     v* written at a random key of the length of k*
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch

from mechedit import applying, cache, editing, keys, models, moments, shipped, sources
from mechedit.benchmarks import counterfact
from mechedit.benchmarks.metrics import worth
from mechedit.cache import content_key
from mechedit.corruption import generator
from mechedit.editing import Found, State
from mechedit.editors.aims import Aim, by_subject
from mechedit.editors.rome import Prepared, Rome, fisher_of, prepare
from mechedit.edits import EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel, hooked, identity
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.settings import FACT_TOKENS, MomentSettings, RomeSettings, SettingsError

__all__ = ["Identity", "RandomKey", "RandomLayer", "random_layer"]

CLAMPS = (0.5, 1.0, 2.0, 4.0)  # times the settings'
TRIALS = 3  # facts on which a layer's clamp is chosen
RULE = "clamps of layers, best S of three facts"


class Identity(Rome):
    """ROME with C = 1."""

    name = "rome-identity"

    def prepare(self, model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> Prepared:
        d_mlp = models.W_out(model, settings.layer).shape[0]
        one = MomentSettings(tokens=d_mlp + 1, prepend_bos=settings.prepend_bos)
        C = torch.eye(d_mlp, dtype=torch.float64)
        moment = Moment.of(model, settings.layer, C, d_mlp + 1, "identity", one)
        return Prepared(moment, keys.prefixes(model, settings), moment, fisher_of(model, settings, progress=progress))


class RandomKey(Rome):
    """ROME whose v* is written at a random key."""

    name = "rome-random-key"

    def aims(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: RomeSettings,
        prepared: Prepared,
        *,
        progress: Progress = silent,
    ) -> list[Aim]:
        found = super().aims(model, facts, settings, prepared, progress=progress)
        return [_at_random(aim, own[0], settings, prepared) for aim, own in zip(found, by_subject(facts), strict=True)]


def _at_random(aim: Aim, fact: Fact, settings: RomeSettings, prepared: Prepared) -> Aim:
    """With a random key as long as the fact's own."""
    stream = generator(settings.seed, "random key", fact.prompt)
    other = torch.randn(len(aim.key), generator=stream, dtype=torch.float64)
    other *= aim.key.double().norm() / other.norm()
    return replace(aim, direction=other, u=prepared.moment.solve(other[None])[0], key=other)


@dataclass(frozen=True)
class EveryLayer:
    """The digest of what each other layer needs, which is kept in the cache, the prefixes, and each layer's clamp."""

    hashes: tuple[tuple[int, str], ...]
    prefixes: tuple[str, ...]
    clamps: tuple[tuple[int, float], ...]

    @property
    def key(self) -> str:
        """A digest of all."""
        return content_key(self.hashes, self.prefixes, self.clamps)


class RandomLayer(Rome):
    """ROME at a layer other than the one of the settings, drawn for the first fact of each edit.

    The settings' clamp, in lengths of a layer's own value, suits the settings' layer. Each other layer has of 0.5, 1, 2 and 4 times that
    clamp the one whose edits of three facts have the best S; it is kept in the cache.
    """

    name = "rome-random-layer"

    def prepare(self, model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> EveryLayer:  # type: ignore[override]
        others = [layer for layer in range(int(model.cfg.n_layers)) if layer != settings.layer]
        if not others:
            raise SettingsError(
                f"{self.name} edits a layer other than that of the settings; {model.cfg.model_name} has one."
            )
        windows = MomentSettings(prepend_bos=settings.prepend_bos)
        Cs = moments.estimate_layers(model, others, settings=windows, progress=progress)
        before = keys.prefixes(model, settings)
        trial = replace(settings, guard="warn", bands=(), strengthen=False, fact_token=FACT_TOKENS[0])
        found, hashes = [], []
        for done, layer in enumerate(others):
            progress("clamps of layers", done, len(others))
            there = replace(trial, layer=layer)
            ready = prepare(model, there, Cs[layer], before)
            found.append((layer, _clamp(model, there, ready)))
            hashes.append((layer, ready.key))
        progress("clamps of layers", len(others), len(others))
        return EveryLayer(tuple(hashes), before, tuple(found))

    def check(  # type: ignore[override]
        self, model: HookedModel, facts: Sequence[Fact], settings: RomeSettings, prepared: EveryLayer | None
    ) -> None:
        super().check(model, facts, settings, None)

    def find(  # type: ignore[override]
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: RomeSettings,
        prepared: EveryLayer,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        layer = random_layer(model, facts[0], settings.layer, settings.seed)
        windows = MomentSettings(prepend_bos=settings.prepend_bos)
        there = replace(settings, layer=layer, clamp=dict(prepared.clamps)[layer])
        with applying.underneath(model):  # C and G are those of `prepare`, whatever edits stand in the model
            moment = moments.estimate(model, layer, settings=windows, progress=progress)
            ready = prepare(model, there, moment, prepared.prefixes, progress=progress)
        found = super().find(model, facts, there, ready, state, progress=progress)
        return replace(found, details={**found.details, "layer": layer, "clamp": there.clamp})


def random_layer(model: HookedModel, fact: Fact, layer: int, seed: int) -> int:
    """A layer other than `layer`, which depends on the seed and the fact beside it."""
    stream = generator(seed, "random layer", fact.prompt)
    drawn = int(torch.randint(int(model.cfg.n_layers) - 1, (1,), generator=stream))
    return drawn + (drawn >= layer)


def _clamp(model: HookedModel, settings: RomeSettings, prepared: Prepared) -> float:
    """The clamp that suits a layer, from the cache where it is there."""
    key = cache.content_key(RULE, identity(model).whole, asdict(settings), prepared.key)
    path = cache.root() / "clamps" / f"{key}.json"
    if path.is_file() and not hooked(model):
        with suppress(ValueError):  # damaged: found again below
            return float(json.loads(path.read_text(encoding="utf-8")))
    rows: dict[float, list[dict[str, float]]] = {times * settings.clamp: [] for times in CLAMPS}
    for fact in _facts(model, settings):
        for clamp, own in rows.items():
            own += _scored(model, fact, replace(settings, clamp=clamp), prepared)
    best = max(sorted(rows), key=lambda clamp: worth(rows[clamp])) if all(rows.values()) else settings.clamp
    if not hooked(model):
        with cache.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(best), encoding="utf-8")
    return best


def _facts(model: HookedModel, settings: RomeSettings) -> list[Fact]:
    """The last facts of the organism's world, or of the built-in ones, that can be edited: evaluations mostly take the first."""
    known = sources.named("organism" if str(model.cfg.model_name) in shipped.MODELS else "built-in")
    whole = [fact for fact in reversed(known) if fact.target_new and fact.paraphrases and fact.neighbours]
    fit = (fact for fact in whole[: 4 * TRIALS] if not editing.refusal(model, fact, Rome(), settings))
    return list(islice(fit, TRIALS))


def _scored(model: HookedModel, fact: Fact, settings: RomeSettings, prepared: Prepared) -> list[dict[str, float]]:
    """The fact's scores with an edit; none where it cannot be edited."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", editing.EditWarning)
        try:
            edit = editing.edit(model, fact, Rome(), settings, prepared=prepared)
            with applying.edited(model, edit):
                return counterfact.scores(model, [fact], prepend_bos=settings.prepend_bos)
        except (EditError, FactError):
            return []
