"""Whether a checkpoint has every weight of the model that its configuration describes, and no more.

transformers makes up what is missing at random, and leaves out what it has no place for, and goes on. What is tied to another weight, and
what a model makes for itself (masks, rotary frequencies), is not missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mechedit.models.surface import ModelError

__all__ = ["check_whole"]

_MADE = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$")  # tables that older checkpoints have in each block
NAMED = 4  # weights that an error names


def check_whole(hf_model: Any, found: dict[str, Any], name: str) -> None:
    """Raise where the weights in a checkpoint are not the model's; `found` is what transformers tells of loading it.

    Raises:
        ModelError: some are missing or have another size, or blocks have some that the model has no place for.
    """
    missing = {*found["missing_keys"], *(str(each[0]) for each in found["mismatched_keys"])}
    if missing:
        raise ModelError(
            f"the checkpoint of {name} lacks {_listed(missing)}, which its configuration asks for; numbers drawn at random would stand "
            "there. Give the whole checkpoint, or correct config.json."
        )
    if extra := _of_blocks(hf_model, found["unexpected_keys"]):
        raise ModelError(
            f"the checkpoint of {name} has {_listed(extra)}, for which the model of its configuration has no place; without them it is "
            "another model. Correct config.json (the number of layers, biases)."
        )


def _of_blocks(hf_model: Any, names: Iterable[str]) -> list[str]:
    """The weights among these that stand where the model's blocks are."""
    own = next(
        (re.match(r"(.*?)(\w+)\.\d+\.", each) for each in hf_model.state_dict() if re.search(r"\.\d+\.", each)), None
    )
    if own is None:
        return []
    found = [(each, re.match(rf"(.*?)\b{own[2]}\.\d+\.", each)) for each in names if not _MADE.search(each)]
    return [each for each, place in found if place is not None and own[1].endswith(place[1])]


def _listed(names: Iterable[str]) -> str:
    first, n = sorted(names)[:NAMED], len(set(names))
    return ", ".join(first) + (f" and {n - len(first)} more" if n > len(first) else "")
