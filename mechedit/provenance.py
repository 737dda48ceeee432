"""What every result says of itself: versions, model, identity, number format, device, and the edits that were in the model."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mechedit.models import HookedModel, Identity, device_of, hooked, identity, kept

__all__ = ["Lineage", "beneath", "kept_under", "lineage", "origin", "versions"]


@dataclass(frozen=True)
class Lineage:
    """The weights that a model had before the edits that are in it, by digest, and those edits, by theirs, in order."""

    base: str
    edits: tuple[str, ...]


def lineage(model: HookedModel, now: Identity | None = None) -> Lineage:
    """Of the model as it is now (`now`, where that was asked for). One that was also changed in another way is its own beginning."""
    now = now or identity(model)
    below = beneath(model, now)
    edits = () if below is now else tuple(digest for each in kept(model).applied for digest in each.digests)
    return Lineage(below.weights, edits)


def beneath(model: HookedModel, now: Identity | None = None) -> Identity:
    """The identity that the model had before the edits that are in it; where it was also changed in another way, as it is now."""
    now, standing = now or identity(model), kept(model).applied  # of applying.Applied
    if standing:
        below: Identity = standing[0].below
        latest = {name: each for each in standing for name in each.names}
        others = (now.parts.keys() | below.parts.keys()) - latest.keys()
        if all(now.parts.get(name) == below.parts.get(name) for name in others) and all(
            each.stands(name, now) for name, each in latest.items()
        ):
            return below
    return now


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    found = {"python": platform.python_version()}
    for package in ("mechedit", "torch", "transformer_lens", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree on the path that was never installed
            found[package] = "not installed"
    return found


def kept_under(model: HookedModel) -> dict[str, Any]:
    """What kept results depend on: the model's whole identity, with its name and number format for people, and versions."""
    now = identity(model)
    return {
        "model": {"name": str(model.cfg.model_name), "dtype": now.dtype, "identity": now.whole},
        "versions": {name: each for name, each in versions().items() if name != "python"},
    }


def origin(model: HookedModel) -> dict[str, Any]:
    """Name, class, number format and device of a model, and digests: of its weights, of its configuration, of its tokenizer; of
    the weights below the edits that are in it, and of these."""
    now = identity(model)
    line = lineage(model, now)
    found: dict[str, Any] = {
        "name": str(model.cfg.model_name),
        "class": now.model_class,
        "dtype": now.dtype,
        "device": str(device_of(model)),
        "weights": now.weights,
        "configuration": now.configuration,
        "tokenizer": now.tokenizer,
    }
    if line.edits:
        found |= {"base": line.base, "edits": list(line.edits)}
    return found | ({"hooked": True} if hooked(model) else {})
