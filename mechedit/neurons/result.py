"""The neurons of one fact, and their file. No model is needed to load, save or draw them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mechedit import cache, parsing
from mechedit.files import FileError

__all__ = ["Neuron", "Neurons"]


@dataclass(frozen=True)
class Neuron:
    """Number `index` of what `W_out` of a block reads: its attribution, the mean over prompts, and in what share of them it is coarse."""

    layer: int
    index: int
    attribution: float
    share: float


@dataclass(frozen=True)
class Neurons:
    """The neurons of one fact's answer. `coarse` has those of any prompt, in order of blocks; `chosen` what is left of them, the strongest
    first, and `p` the share of prompts that each of those is coarse in; `p_answer` is P(answer) after each prompt."""

    model: str
    subject: str
    prompt: str
    answer: str
    n_layers: int
    prompts: tuple[str, ...]
    p_answer: tuple[float, ...]
    p: float
    chosen: tuple[Neuron, ...] = field(repr=False)
    coarse: tuple[Neuron, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{len(self.chosen)} neurons of {self.answer!r} after {self.prompt!r}: " + ", ".join(
            f"{each.layer}.{each.index}" for each in self.chosen
        )

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all.

        Raises:
            WriteError: the path cannot be written.
        """
        with cache.atomic_write(Path(path)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        return Path(path)

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def load(path: str | Path) -> Neurons:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        try:
            record = parsing.from_file(Path(path))
            parsing.check(record, _FORM)
            groups = {name: tuple(Neuron(**each) for each in record[name]) for name in ("chosen", "coarse")}
            lists = {name: tuple(record[name]) for name in ("prompts", "p_answer", "notes")}
            return Neurons(**{**record, **groups, **lists})
        except (parsing.ParseError, TypeError) as error:
            raise FileError(f"{path} holds no neurons: {error}.") from error


_NEURON = {"layer": int, "index": int, "attribution": parsing.number, "share": parsing.number}
_FORM = {
    **dict.fromkeys(("model", "subject", "prompt", "answer"), str),
    "n_layers": int,
    "prompts": [str],
    "p_answer": [parsing.number],
    "p": parsing.number,
    "chosen": [_NEURON],
    "coarse": [_NEURON],
    "notes": [str],
}  # of the record in its file
