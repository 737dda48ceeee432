"""What every result says of itself: versions, model, weights, number format, device."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mechedit.models import HookedModel, device_of, fingerprint, weight_hash

__all__ = ["identity", "origin", "versions"]


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    found = {"python": platform.python_version()}
    for package in ("mechedit", "torch", "transformer_lens", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree on the path that was never installed
            found[package] = "not installed"
    return found


def identity(model: HookedModel) -> dict[str, Any]:
    """What kept results depend on: name, number format, and hashes of the weights, `fingerprint` of every part of them."""
    return {
        "name": str(model.cfg.model_name),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weight_hash": weight_hash(model),
        "fingerprint": fingerprint(model),
    }


def origin(model: HookedModel) -> dict[str, Any]:
    """Name, class, weight hash, number format and device of a model."""
    return {
        "name": str(model.cfg.model_name),
        "class": type(model).__name__,
        "weight_hash": weight_hash(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(device_of(model)),
    }
