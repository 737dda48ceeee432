"""An edited model for other tools: a Hugging Face checkpoint, or a LoRA adapter for `peft`.

The checkpoint is the original with the changed weights in the place and layout that its architecture has for them. The adapter adds the
same changes to the plain model: a change of low rank, left^T right, is exactly an adapter of that rank,

    A = left, [rank, rows]      B = right^T, [columns, rank]      lora_alpha = r = rank, so that B A is added unscaled

A change of high rank is refused as an adapter, or approximated on request, with the error that is left. Several changes of one module
share its adapter. Where an architecture keeps several weights in one parameter (GPT-2's queries, keys and values), a weight is some of
the parameter's columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import applying, cache, models, provenance
from mechedit.changes import Change, Factors, by_weight, norm, total
from mechedit.edits import Edit, EditError
from mechedit.errors import MecheditError
from mechedit.huggingface import Place, place
from mechedit.models import HookedModel
from mechedit.weights import Weight, as_matrix, value

__all__ = ["adapter", "check_folder", "checkpoint"]

SHOWN_RANKS = (1, 8, 64)  # of which an error message says what error they leave


def checkpoint(
    model: HookedModel, name: str, edited: Sequence[Edit], folder: str | Path, *, force: bool = False
) -> Path:
    """Write the model `name`, with the edits in it, as a folder in Hugging Face's format, tokenizer included.

    `model` is that model as `models.load` gives it, unedited; the weights keep its number format. `mechedit.json` beside them says
    which edits are in them.

    Raises:
        EditError: an edit was made for other weights (and `force` is not given), or tells the model something, which is no weight; or no
            parameter equals one of the model's weights.
        WriteError: the folder cannot be written.
    """
    folder = check_folder(folder)
    _refuse_telling(edited)
    plain, tokenizer, places = _opened(model, name, edited, force=force)
    with applying.edited(model, *edited, force=True):
        for weight, each in places.items():
            each.write_(as_matrix(weight, value(model, weight)).detach())
    with _whole(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_json(temporary / "mechedit.json", _record(name, edited))
    return folder


def adapter(
    model: HookedModel,
    name: str,
    edited: Sequence[Edit],
    folder: str | Path,
    *,
    rank: int | None = None,
    force: bool = False,
) -> Path:
    """Write the edits as a LoRA adapter of the plain model `name`, which `peft.PeftModel.from_pretrained` loads.

    With `rank`, changes of higher rank are approximated by their largest singular directions; `mechedit.json` says which error, in
    shares of the change's norm, is left of each.

    Raises:
        EditError: an edit was made for other weights (and `force` is not given), or tells the model something, which is no weight; no
            parameter equals one of the model's weights; or a change has no exact adapter and `rank` is not given.
        WriteError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = check_folder(folder)
    _refuse_telling(edited)
    own = by_weight(change for edit in edited for change in edit.changes)
    made = {weight: _factors(weight, changes, rank) for weight, changes in own.items()}
    _, _, places = _opened(model, name, edited, force=force)
    modules: dict[str, list[tuple[Place, Factors]]] = {}
    for weight, (factors, _) in made.items():
        modules.setdefault(places[weight].module, []).append((places[weight], factors))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, parts in modules.items():
        left = torch.cat([left for _, (left, _) in parts])
        right = torch.cat([each.widened(right) for each, (_, right) in parts])
        ranks[module] = len(left)
        tensors[f"base_model.model.{module}.lora_A.weight"] = left.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = right.float().T.contiguous()
    with _whole(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        _write_json(temporary / "adapter_config.json", _config(name, ranks, list(places.values())))
        errors = {str(weight): error for weight, (_, error) in made.items() if error}
        _write_json(temporary / "mechedit.json", _record(name, edited) | ({"errors": errors} if errors else {}))
    return folder


def _config(name: str, ranks: dict[str, int], places: Sequence[Place]) -> dict[str, Any]:
    rank = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {module: n for module, n in ranks.items() if n != rank},
        "alpha_pattern": {module: n for module, n in ranks.items() if n != rank},
        "target_modules": sorted(ranks),
        "fan_in_fan_out": all(each.in_by_out for each in places),  # GPT-2's Conv1D; A and B are the same either way
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _factors(weight: Weight, changes: Sequence[Change], rank: int | None) -> tuple[Factors, float]:
    """The factors of all changes of a weight, and the error that is left, as a share of their norm.

    Raises:
        EditError: they have none that an adapter could hold.
    """
    if weight.name.split(".")[1].startswith("b"):
        raise EditError(
            f"a LoRA adapter has no place for a bias, and these edits change {weight}. Export a checkpoint."
        )
    found = [change.factors() for change in changes]
    thin = [factors for factors in found if factors is not None]
    if len(thin) == len(found):
        left, right = (torch.cat(parts) for parts in zip(*thin, strict=True))
        if len(left) <= rank if rank is not None else _is_low(len(left), changes[0].shape):
            return (left, right), 0.0
    return _approximated(weight, total(changes), norm(changes), rank)


def _is_low(rank: int, shape: tuple[int, int]) -> bool:
    """Whether factors of this rank hold fewer numbers than the matrix."""
    return rank * sum(shape) < shape[0] * shape[1]


def _approximated(
    weight: Weight, change: Float[Tensor, "rows columns"], size: float, rank: int | None
) -> tuple[Factors, float]:
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    tiny = float(S[0]) * max(change.shape) * torch.finfo(torch.float64).eps
    own = int((tiny < S).sum())

    def left_over(n: int) -> float:
        return float(S[n:].norm()) / size if size else 0.0

    if rank is None and not _is_low(own, (change.shape[0], change.shape[1])):
        errors = ", ".join(f"{n} would leave {left_over(n):.0%}" for n in SHOWN_RANKS if n < own)
        raise EditError(
            f"the change of {weight} has rank {own} (of at most {len(S)}), as many numbers in factors as whole: rank {errors} of its norm as "
            "error. Export a checkpoint, or ask for an approximation by its rank (rank=N, --rank N)."
        )
    n = own if rank is None else min(rank, own)
    return (U[:, :n].T, S[:n, None] * V[:n]), left_over(n) if n < own else 0.0


def _record(name: str, edited: Sequence[Edit]) -> dict[str, Any]:
    """What was exported, for who finds the folder."""
    return {"model": name, "versions": provenance.versions(), "edits": [edit.to_json() for edit in edited]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(cache.plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair is JSON's own \ud800


def check_folder(folder: str | Path) -> Path:
    """The folder, if it can be written and holds no file yet, so that nothing of another model is mixed in.

    Raises:
        EditError: it is not empty.
        WriteError: it cannot be written.
    """
    folder = Path(folder)
    if ".." in folder.parts:  # through a folder that is not there yet, nothing can be looked at
        folder = cache.straight(folder)
    if folder.exists() and not folder.is_dir():
        raise EditError(f"{folder} is no folder; export into a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise EditError(f"{folder} is not empty; export into a new folder.")
    cache.check_writable(folder / "config.json")
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder whose files become those of `folder` if the body ends without an error; if not, nothing is left.

    Raises:
        WriteError: the disk is full, or refuses in another way.
    """
    with _written(folder), cache.unless_kept(folder) as keep:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name:
            temporary = Path(name)
            yield temporary
            mode = folder.stat().st_mode & 0o666  # safetensors makes private files; an export is shared like any other
            files = sorted(temporary.iterdir())
            for file in files:
                file.chmod(mode)
            for file in files:  # on one disk, so that nothing is copied
                file.replace(folder / file.name)
        keep()


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Let what the disk refuses say so, whichever library wrote."""
    from safetensors import SafetensorError

    try:
        yield
    except MecheditError:
        raise
    except (OSError, SafetensorError) as error:
        raise cache.WriteError(
            f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}. Nothing is left of it."
        ) from error
    except Exception as error:
        if "os error" not in str(error):  # as tokenizers, whose errors have no class, tell what the system refused
            raise
        raise cache.WriteError(f"{folder} cannot be written: {error}. Nothing is left of it.") from error


def _refuse_telling(edited: Sequence[Edit]) -> None:
    """Raise where an edit is more than weights."""
    if texts := [edit.told for edit in edited if edit.told]:
        raise EditError(
            f"an export has weights alone, and these edits put {''.join(texts)!r} before every prompt. Export the others, and put that text "
            "(edit.told) before prompts where the model is used."
        )


def _opened(
    model: HookedModel, name: str, edited: Sequence[Edit], *, force: bool
) -> tuple[Any, Any, dict[Weight, Place]]:
    """Hugging Face's model and tokenizer, and where it keeps each edited weight."""
    if not force:
        applying.check(model, edited)
    own = by_weight(change for edit in edited for change in edit.changes)
    if not own:
        raise EditError("there is nothing to export: the edits have no changes.")
    plain, tokenizer = models.hugging_face(name, next(model.parameters()).dtype)
    return plain, tokenizer, {weight: place(plain, model, weight) for weight in own}
