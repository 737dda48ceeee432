"""Text of the packaged Gemma, sampled from it once and shipped, so that the first C takes seconds and not minutes.

It is what `generation.sample` gives for the seed in its record, batch by batch; `experiments/sample_text.py` made it. It stands in for
sampling where the parameters are those that wrote it, bit for bit as float32.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from mechedit import files
from mechedit.models import HookedModel, identity
from mechedit.models.identities import digest_of

__all__ = ["PLACE", "read", "write"]

PLACE = Path(str(resources.files("mechedit"))) / "data" / "gemma-3-270m" / "moment_text.safetensors"


def read(model: HookedModel, rows: int, length: int, seed: tuple[int, str, str]) -> Int[Tensor, "rows length"] | None:
    """The shipped batch of this seed; None where none of that size ships, or the model is another."""
    if not PLACE.is_file():
        return None
    batches, record = files.read(PLACE, "moment-text")
    number, purpose, index = seed
    batch = batches.get(index)
    wanted = (record["seed"], record["purpose"], (rows, length))
    if batch is None or wanted != (number, purpose, tuple(batch.shape)) or record["parameters"] != _wrote(model):
        return None
    return batch.long()


def write(
    model: HookedModel, batches: dict[str, Int[Tensor, "rows length"]], seed: int, purpose: str, path: Path = PLACE
) -> Path:
    """Save sampled batches, by their index, as what this model's parameters wrote."""
    record = {"seed": seed, "purpose": purpose, "parameters": _wrote(model), "model": str(model.cfg.model_name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write(path, "moment-text", {index: batch.int() for index, batch in batches.items()}, record)


def _wrote(model: HookedModel) -> str:
    """A digest of the parameters alone: the files of a tokenizer differ between versions of transformers."""
    return digest_of(identity(model).parts)
