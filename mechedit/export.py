"""An edited model for other tools: a Hugging Face checkpoint, or a LoRA adapter for `peft`.

The checkpoint is the original with the changed `W_out`s in the place and layout that its architecture has for them. The
adapter adds the same changes to the plain model: an edit is `outer(u, step)`, so that n edits of one layer are exactly an adapter
of rank n:

    A = the u's, [n, d_mlp]      B = the steps, [d_model, n]      lora_alpha = r = n, so that B A is added unscaled

Hugging Face's parameter is found by its values, not by a table of names: it is the matrix of that block which equals `W_out`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechedit import cache, edits, models, provenance
from mechedit.edits import Edit, EditError
from mechedit.models import HookedModel

__all__ = ["adapter", "check_folder", "checkpoint"]


def checkpoint(
    model: HookedModel, name: str, edited: Sequence[Edit], folder: str | Path, *, force: bool = False
) -> Path:
    """Write the model `name`, with the edits in it, as a folder in Hugging Face's format, tokenizer included.

    `model` is that model as `models.load` gives it, unedited; the weights keep its number format. `mechedit.json` beside them says
    which edits are in them.

    Raises:
        EditError: an edit was made for other weights (and `force` is not given), or no parameter equals the model's `W_out`.
        WriteError: the folder cannot be written.
    """
    folder = check_folder(folder)
    plain, tokenizer, places = _opened(model, name, edited, force=force)
    with edits.edited(model, *edited, force=True), torch.no_grad():
        for layer, (_, parameter, transposed) in places.items():
            weight = models.W_out(model, layer)
            parameter.copy_(weight.T if transposed else weight)
    with _whole(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_json(temporary / "mechedit.json", _record(name, edited))
    return folder


def adapter(model: HookedModel, name: str, edited: Sequence[Edit], folder: str | Path, *, force: bool = False) -> Path:
    """Write the edits as a LoRA adapter of the plain model `name`, which `peft.PeftModel.from_pretrained` loads.

    Raises:
        EditError: an edit was made for other weights (and `force` is not given), or no parameter equals the model's `W_out`.
        WriteError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = check_folder(folder)
    _, _, places = _opened(model, name, edited, force=force)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, (parameter, _, _) in places.items():
        module = parameter.removesuffix(".weight")
        changes = [change for edit in edited for change in edit.changes if change.layer == layer]
        ranks[module] = len(changes)
        u, step = (torch.stack([getattr(change, factor) for change in changes]).float() for factor in ("u", "step"))
        tensors[f"base_model.model.{module}.lora_A.weight"] = u
        tensors[f"base_model.model.{module}.lora_B.weight"] = step.T.contiguous()
    # GPT-2's Conv1D keeps [in, out]; A and B are the same either way
    conv1d = not any(transposed for _, _, transposed in places.values())
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {module: n for module, n in ranks.items() if n != rank},
        "alpha_pattern": {module: n for module, n in ranks.items() if n != rank},
        "target_modules": sorted(ranks),
        "fan_in_fan_out": conv1d,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with _whole(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        _write_json(temporary / "adapter_config.json", config)
        _write_json(temporary / "mechedit.json", _record(name, edited))
    return folder


def _record(name: str, edited: Sequence[Edit]) -> dict[str, Any]:
    """What was exported, for who finds the folder."""
    return {"model": name, "versions": provenance.versions(), "edits": [edit.to_json() for edit in edited]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(cache.plain(content), indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def check_folder(folder: str | Path) -> Path:
    """The folder, if it can be written and holds no file yet, so that nothing of another model is mixed in.

    Raises:
        EditError: it is not empty.
        WriteError: it cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise EditError(f"{folder} is not empty; export into a new folder.")
    cache.check_writable(folder / "config.json")
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that becomes `folder` if the body ends without an error."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        mode = folder.stat().st_mode
        temporary.chmod(mode)
        for file in temporary.iterdir():
            file.chmod(mode & 0o666)  # safetensors makes private files; an export is shared like any other
        temporary.replace(folder)  # which is there, and empty
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _opened(
    model: HookedModel, name: str, edited: Sequence[Edit], *, force: bool
) -> tuple[Any, Any, dict[int, tuple[str, Tensor, bool]]]:
    """Hugging Face's model and tokenizer, and where it keeps the `W_out` of each edited layer."""
    if not force:
        edits.check(model, edited)
    layers = sorted({change.layer for edit in edited for change in edit.changes})
    if not layers:
        raise EditError("there is nothing to export: the edits have no changes.")
    plain, tokenizer = models.hugging_face(name, next(model.parameters()).dtype)
    return plain, tokenizer, {layer: _parameter(plain, model, layer) for layer in layers}


def _parameter(plain: Any, model: HookedModel, layer: int) -> tuple[str, Tensor, bool]:
    """Hugging Face's name of a block's `W_out`, the parameter, and whether it is stored [d_model, d_mlp]."""
    weight = models.W_out(model, layer).detach().cpu()
    for name, parameter in plain.named_parameters():
        if f".{layer}." in name and sorted(parameter.shape) == sorted(weight.shape):
            for transposed, each in ((False, parameter), (True, parameter.T)):
                if each.shape == weight.shape and torch.equal(each, weight):
                    return name, parameter, transposed
    raise EditError(
        f"no parameter of block {layer} of the Hugging Face model equals W_out of {model.cfg.model_name}: it is another model, or "
        "it is edited. Load it afresh."
    )
