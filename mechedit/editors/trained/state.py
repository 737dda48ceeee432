"""What training makes: a network, and what it belongs to. A safetensors file with a JSON record, whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mechedit import files, models, writing
from mechedit.cache import plain
from mechedit.editors.trained.factors import edited_weights
from mechedit.editors.trained.ke import Ke
from mechedit.editors.trained.mend import Mend
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.files import FileError
from mechedit.models import HookedModel
from mechedit.models.identities import digest_of
from mechedit.parsing import check
from mechedit.prompts import resolve_bos
from mechedit.provenance import beneath
from mechedit.settings import TRAINING, TrainingSettings, from_json
from mechedit.weights import Weight, matrix_shape

__all__ = [
    "KIND",
    "Trained",
    "check_belongs",
    "command",
    "condition_text",
    "file_of",
    "load",
    "new",
    "restored",
    "shipped",
    "subject_ids",
]

KIND = "trained-editor"
SHIPPED = Path(str(resources.files("mechedit"))) / "data" / "trained"
NAMES = ("generic", "set")  # of those that ship: trained on text, and on the kind of facts that they are judged on
_FORM = {
    "editor": str,
    "settings": dict,
    "model": {"name": str, "parameters": str, "dtype": str, "d_model": int, "d_vocab": int},
    "weights": [[object]],
    "training": dict,
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A network, the record of what it was trained for and on, and the subjects that it was trained on, as `subject_ids`."""

    network: Mend | Ke
    record: dict[str, Any]
    subjects: Int[Tensor, " subjects"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weights that it edits."""
        return tuple(self.network.shapes)

    @property
    def settings(self) -> TrainingSettings:
        """How it was trained."""
        return from_json(TRAINING[self.record["editor"]], self.record["settings"])

    @cached_property
    def key(self) -> str:
        """The digest that its file has."""
        return files.digest(self._tensors(), self.record)

    def _tensors(self) -> dict[str, Tensor]:
        own = {f"network.{name}": each.detach().cpu() for name, each in self.network.state_dict().items()}
        return {name: each.contiguous() for name, each in own.items()} | {"subjects": self.subjects}

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all."""
        return files.write(path, KIND, self._tensors(), self.record)

    def seen(self, subjects: Sequence[str]) -> list[bool]:
        """Whether it was trained on facts of these subjects."""
        return torch.isin(subject_ids(subjects), self.subjects).tolist()


def new(model: HookedModel, editor: str, settings: TrainingSettings) -> Trained:
    """An untrained one, for the model without the edits that stand in it."""
    bos = resolve_bos(model, settings.prepend_bos)
    weights = edited_weights(model, settings.layers)
    now = beneath(model)
    record = {
        "editor": editor,
        "settings": plain(
            {**vars(settings), "layers": sorted({weight.layer for weight in weights}), "prepend_bos": bos}
        ),
        "model": {
            "name": str(model.cfg.model_name),
            "parameters": digest_of(now.parts),
            "dtype": now.dtype,
            "d_model": int(model.cfg.d_model),
            "d_vocab": int(model.cfg.d_vocab),
        },
        "weights": [[weight.layer, weight.name, *matrix_shape(model, weight)] for weight in weights],
        "training": {},
    }
    every = torch.arange(int(model.cfg.d_vocab), device=models.device_of(model))
    embeddings = models.embed(model, every[None])[0] if getattr(settings, "embeddings", "held") == "trained" else None
    return Trained(_network(record, embeddings).to(models.device_of(model)), record)


def _network(record: Mapping[str, Any], embeddings: Tensor | None = None) -> Mend | Ke:
    """The network of a record, untrained."""
    shapes = {Weight(layer, name): (d_in, d_out) for layer, name, d_in, d_out in record["weights"]}
    settings: Any = from_json(TRAINING[record["editor"]], record["settings"])
    if record["editor"] == "mend":
        return Mend(shapes, settings)
    d_model = record["model"]["d_model"]
    if settings.embeddings == "trained" and embeddings is None:
        embeddings = torch.zeros(record["model"]["d_vocab"], d_model)
    return Ke(shapes, settings, d_model, embeddings)


def load(path: str | Path) -> Trained:
    """What `Trained.save` wrote.

    Raises:
        FileError: the file is missing, cut, changed, something else, or its record or tensors are of no such network.
    """
    return restored(*files.read(path, KIND), path)


def restored(tensors: Mapping[str, Shaped[Tensor, ...]], record: dict[str, Any], path: str | Path) -> Trained:
    """The network of these tensors and this record, from a file that was read; errors as in `load`."""
    try:
        check(record, _FORM)
        network = _network(record)
        network.load_state_dict({name.removeprefix("network."): each for name, each in tensors.items() if name.startswith("network.")})  # fmt: skip
        return Trained(network, record, tensors["subjects"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"{path} is a trained editor whose parts do not fit each other ({' '.join(str(error).split())[:300]}). Train it again.") from error  # fmt: skip


def subject_ids(subjects: Sequence[str]) -> Int[Tensor, " subjects"]:
    """A number for each subject: 8 bytes of the SHA-256 of its letters, however they are composed or capitalised."""
    digests = (hashlib.sha256(writing.folded(each).encode()).digest() for each in subjects)
    return torch.tensor([int.from_bytes(each[:8], "little", signed=True) for each in digests], dtype=torch.int64)


def condition_text(fact: Fact, form: str) -> str:
    """What KE's LSTM reads of a fact."""
    said = "".join(writing.seam(fact.prompt, str(fact.target_new), fact.join))
    return said if form == "published" else f"{fact.target_true or ''} >> {fact.target_new} || {fact.prompt}"


def command(model: HookedModel, editor: str) -> str:
    """The command that trains one."""
    return f"`mechedit train-editor {editor} --model {model.cfg.model_name} --data FACTS --out DIR`"


def shipped(model: HookedModel, editor: str) -> dict[str, Path]:
    """The checkpoints of an editor that ship for a model, by name."""
    name = str(model.cfg.model_name).rsplit("/", 1)[-1].lower()
    files_of = {each: SHIPPED / f"{name}.{editor}.{each}.safetensors" for each in NAMES}
    return {each: path for each, path in files_of.items() if path.is_file()}


def file_of(model: HookedModel, editor: str, checkpoint: str) -> Path:
    """The file of a checkpoint that is given as a file, a folder, or the name of one that ships.

    Raises:
        EditError: there is none.
    """
    there = shipped(model, editor)
    if not checkpoint:
        if there:
            return next(iter(there.values()))
        raise EditError(f"the editor {editor} is trained before it edits, and none ships for {model.cfg.model_name}. Train one with {command(model, editor)}, and give it as checkpoint (--checkpoint DIR).")  # fmt: skip
    if checkpoint in there:
        return there[checkpoint]
    path = Path(checkpoint)
    try:
        path = path / f"{editor}.safetensors" if path.is_dir() else path
        found = path.is_file()
    except OSError as error:  # its name is too long
        raise EditError(f"the checkpoint {checkpoint[:80]}… cannot be read: {error.strerror}.") from error
    if not found:
        also = f", or one of {', '.join(there)}" if there else ""
        raise EditError(f"a checkpoint is a file that `mechedit train-editor` made, or its folder{also}; found {checkpoint!r}. {command(model, editor)} makes one.")  # fmt: skip
    return path


def check_belongs(model: HookedModel, editor: str, record: Mapping[str, Any], form: str, where: str) -> None:
    """Raise unless a checkpoint's record is of this editor, of this form, and of the model without the edits that stand in it.

    Raises:
        EditError: it is not.
    """
    own = record.get("model", {})
    now = beneath(model)
    found = record.get("settings", {}).get("form")
    for holds, message in (
        (record.get("editor") == editor, f"is of the editor {record.get('editor')}, not of {editor}"),
        (form in ("any", found), f"is of the form {found!r}, and form is {form!r}"),
        (
            own.get("parameters") == digest_of(now.parts),
            f"was trained for other weights ({own.get('name')} in {own.get('dtype')}) than those of {model.cfg.model_name} in {now.dtype}",
        ),
    ):
        if not holds:
            raise EditError(f"{where} {message}. {command(model, editor)} trains one.")
