"""Controls: ROME with one of its parts taken out, to see what that part is worth. Each is an editor.

rome-identity       C = 1, as if every direction of keys were as common
rome-random-layer   another layer for each subject, drawn by the settings' seed
rome-random-key     v* written at a random key of the length of k*
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mechedit import applying, keys, models, moments
from mechedit.cache import content_key
from mechedit.corruption import generator
from mechedit.editing import Found, State
from mechedit.editors.rome import Aim, Prepared, Rome
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.settings import MomentSettings, RomeSettings

__all__ = ["Identity", "RandomKey", "RandomLayer", "random_layer"]


class Identity(Rome):
    """ROME with C = 1."""

    name = "rome-identity"

    def prepare(self, model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> Prepared:
        d_mlp = models.W_out(model, settings.layer).shape[0]
        one = MomentSettings(tokens=d_mlp + 1, prepend_bos=settings.prepend_bos)
        C = torch.eye(d_mlp, dtype=torch.float64)
        moment = Moment.of(model, settings.layer, C, d_mlp + 1, "identity", one)
        return Prepared(moment, keys.prefixes(model, settings), moment)


class RandomKey(Rome):
    """ROME whose v* is written at a random key."""

    name = "rome-random-key"

    def aim(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: RomeSettings,
        prepared: Prepared,
        *,
        progress: Progress = silent,
    ) -> Aim:
        found = super().aim(model, facts, settings, prepared, progress=progress)
        stream = generator(settings.seed, "random key", facts[0].prompt)
        other = torch.randn(len(found.key), generator=stream, dtype=torch.float64)
        other *= found.key.double().norm() / other.norm()
        u = prepared.moment.solve(other[None])[0]
        return replace(found, direction=other, u=u, key=other)


@dataclass(frozen=True)
class EveryLayer:
    """The digest of each other layer's C, which is kept in the cache, and the prefixes."""

    hashes: tuple[tuple[int, str], ...]
    prefixes: tuple[str, ...]

    @property
    def key(self) -> str:
        """A digest of both."""
        return content_key(self.hashes, self.prefixes)


class RandomLayer(Rome):
    """ROME at a layer other than the one of the settings, drawn for the first fact of each edit."""

    name = "rome-random-layer"

    def prepare(self, model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> EveryLayer:  # type: ignore[override]
        others = [layer for layer in range(int(model.cfg.n_layers)) if layer != settings.layer]
        windows = MomentSettings(prepend_bos=settings.prepend_bos)
        Cs = moments.estimate_layers(model, others, settings=windows, progress=progress)
        return EveryLayer(tuple((layer, Cs[layer].hash) for layer in others), keys.prefixes(model, settings))

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
        with applying.underneath(model):  # C is that of `prepare`, whatever edits stand in the model
            moment = moments.estimate(model, layer, settings=windows, progress=progress)
        there = replace(settings, layer=layer)
        return super().find(model, facts, there, Prepared(moment, prepared.prefixes, moment), state, progress=progress)


def random_layer(model: HookedModel, fact: Fact, layer: int, seed: int) -> int:
    """A layer other than `layer`, which depends on the seed and the fact beside it."""
    stream = generator(seed, "random layer", fact.prompt)
    drawn = int(torch.randint(int(model.cfg.n_layers) - 1, (1,), generator=stream))
    return drawn + (drawn >= layer)
