"""The trained models that ship with mechedit, as folders in Hugging Face's format. Loads nothing heavy."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["MODELS", "folder"]

MODELS = {"organism": "gpt2", "organism-gptj": "gptj", "organism-llama": "llama"}
"""The trained models by name, and whose shape each has; all have learnt the world of `WorldSettings()`."""


def folder(name: str = "organism") -> Path:
    """Where a trained model lies: a folder that `transformers` loads as well."""
    return Path(str(resources.files("mechedit"))) / "data" / name
