"""Which model this is: a digest of every parameter, of the configuration, of the tokenizer.

Parameters are digested by the names that both model classes share, in one memory layout, as float32, so that a
`HookedTransformer` and a `TransformerBridge` of one checkpoint have one identity. It is made once a model and holds as long as
nothing shows a change (`mechedit.models.kept`); then only what was written to is read again. The digest is XXH3 of 128 bits: it
tells models apart, and is no protection from somebody who makes two alike.

What was computed is kept under the part of the identity that it depends on:

    whole     everything: what the model says
    keys(l)   all that the keys of block l depend on; not the W_out of that block, nor anything above
    around(l) everything but that W_out and its bias
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor

from mechedit.models.keeping import Watch, kept, told
from mechedit.models.names import NAMES, find_weight
from mechedit.models.surface import HookedModel, device_of, embed, is_bridge, without_forward_hooks

__all__ = ["Identity", "digest_of", "identity", "note_loaded", "weight_hash"]

ROWS = 16384  # embeddings that are read at once
UNUSED = ".qkv."  # a fused copy that a bridge keeps beside the parts that it computes with
NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
ASIDE = {  # of a configuration, what no number depends on
    *("device", "dtype", "n_devices", "model_name", "tokenizer_name", "seed", "init_weights", "init_mode", "initializer_range"),
    *("n_params", "default_prepend_bos", "trust_remote_code", "from_checkpoint", "checkpoint_index", "checkpoint_label_type"),
    *("checkpoint_value", "use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in", "use_hook_tokens"),
    *("_name_or_path", "transformers_version", "torch_dtype", "use_cache", "loaded", "tokenizer_prepends_bos"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "_attn_implementation", "architectures"),
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Digests: of each part of the parameters, of the configuration alike on every model class (`configuration`) and as this
    class has resolved it (`resolved`), of the tokenizer; with the number format and the class, and the text that stands before
    prompts, if one does."""

    parts: dict[str, str]
    configuration: str
    resolved: str
    tokenizer: str
    dtype: str
    model_class: str
    told: str = ""

    @cached_property
    def weights(self) -> str:
        """Of all parameters and the configuration, and of the text before prompts: what an edit was made for."""
        return digest_of(self.parts, self.configuration, *self._before)

    @cached_property
    def whole(self) -> str:
        """Of everything that what the model says depends on."""
        return digest_of(self.parts, self._rest, *self._before)

    def keys(self, layer: int) -> str:
        """Of everything that the keys of a block depend on, in texts that stand alone."""
        after = (f"{layer}.mlp.W_out", f"{layer}.mlp.b_out", f"{layer}.ln2_post", "ln_final", "unembed")
        below = {
            name: digest
            for name, digest in self.parts.items()
            if not name.startswith(after) and not (name.split(".")[0].isdigit() and int(name.split(".")[0]) > layer)
        }
        return digest_of(below, layer, self._rest)

    def around(self, layer: int) -> str:
        """Of everything that what the model says depends on, in texts that stand alone, but a block's W_out."""
        own = (f"{layer}.mlp.W_out", f"{layer}.mlp.b_out")
        rest = {name: digest for name, digest in self.parts.items() if name not in own}
        return digest_of(rest, layer, self._rest)

    @property
    def _before(self) -> list[str]:
        return [self.told] if self.told else []

    @property
    def _rest(self) -> list[str]:
        return [self.configuration, self.resolved, self.tokenizer, self.dtype, self.model_class]


def identity(model: HookedModel) -> Identity:
    """The identity of the model as it is now."""
    loaded = getattr(model.cfg, "loaded", {})
    parts, resolved, tokenizer = _parts(model), _resolved(model), _tokenizer(model)
    own = kept(model)
    latest: Identity | None = own.identity
    now = (resolved, tokenizer, told(model))
    if latest is None or latest.parts is not parts or (latest.resolved, latest.tokenizer, latest.told) != now:
        own.identity = latest = Identity(
            parts=parts,
            configuration=loaded["configuration"] if loaded.get("resolved") == resolved else resolved,
            resolved=resolved,
            tokenizer=tokenizer,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            model_class=type(model).__name__,
            told=now[-1],
        )
    return latest


def note_loaded(model: HookedModel, config: Any, tokenizer_files: bytes, biases: Sequence[str] = ()) -> None:
    """Note, in the model's `cfg`, what it was loaded from: Hugging Face's configuration, the files of the tokenizer, and which biases
    Hugging Face's model has (`names.biases_of`).

    They are digested more quickly than what was made of them, and alike on every model class. They hold while what was made of
    them is as it was.
    """
    model.cfg.loaded = {
        "configuration": digest_of(_kept_fields(config.to_dict())),
        "resolved": _resolved(model),
        "tokenizer": xxhash.xxh3_128_hexdigest(tokenizer_files),
        "tokenizer_now": _tokenizer_now(model),
        "biases": tuple(biases),
    }


def digest_of(*values: Any) -> str:
    """The digest of JSON values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())


# --- parameters -------------------------------------------------------------------------------------------------------


def _parts(model: HookedModel) -> dict[str, str]:
    """The digest of each part, read again where it was written to."""
    own = kept(model)
    if own.watch is None or not own.watch.is_of_all():
        own.watch, own.digests = Watch(model), {}
        with without_forward_hooks(model):
            own.watch.named = _named(model, own.watch)
        changed = None
    else:
        written = own.watch.written()
        if not written:
            return own.digests
        changed = own.watch.storages(written)
        own.watch.look_again()
    found = dict(own.digests)
    with torch.no_grad(), without_forward_hooks(model):
        for name, stored in own.watch.named.items():
            if changed is None or stored.untyped_storage().data_ptr() in changed:
                found[name] = _digest(model, name, stored)
    own.digests = {name: digest for name, digest in found.items() if digest}
    return own.digests


def _named(model: HookedModel, watch: Watch) -> dict[str, Tensor]:
    """Every parameter's tensor: by the name that all classes share where there is one, else by its own."""
    found = {"embed": model.embed.W_E, "unembed.W_U": model.unembed.W_U, "unembed.b_U": model.unembed.b_U}
    found |= {"pos": getattr(getattr(model, "pos_embed", None), "W_pos", None)}
    found |= _of_norm("ln_final", getattr(model, "ln_final", None))
    for layer, block in enumerate(model.blocks):
        found |= {f"{layer}.{name}": find_weight(model, layer, name) for name in NAMES}
        for name in NORMS:
            found |= _of_norm(f"{layer}.{name}", getattr(block, name, None))
        if not hasattr(block, "ln2"):  # one norm for both branches, of which a HookedTransformer has two copies
            found |= _of_norm(f"{layer}.ln2", getattr(block, "ln1", None))
        for name in ("q_norm", "k_norm"):
            found |= _of_norm(f"{layer}.attn.{name}", getattr(getattr(block, "attn", None), name, None))
    there = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    covered = {tensor.untyped_storage().data_ptr() for tensor in there.values()}
    own_names = {id(parameter): name for name, parameter in model.named_parameters()}
    rest = {own_names.get(id(tensor), "?"): tensor for tensor in watch.tensors}
    return there | {
        f"own.{name}": tensor
        for name, tensor in rest.items()
        if tensor.untyped_storage().data_ptr() not in covered and UNUSED not in name
    }


def _of_norm(name: str, module: Any) -> dict[str, Tensor | None]:
    return {f"{name}.{part}": getattr(module, part, None) for part in ("w", "b")}


def _digest(model: HookedModel, name: str, stored: Tensor) -> str:
    """Of one part; empty where it is a bias of zeros, which some classes have where others have none."""
    is_bias = name.rsplit(".", 1)[-1].startswith("b")
    if is_bias and not stored.any():
        return ""
    digest = xxhash.xxh3_128(str(tuple(stored.shape)).encode())
    for part in _as_read(model, name, stored):
        digest.update(part.detach().float().cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


def _as_read(model: HookedModel, name: str, stored: Tensor) -> Iterator[Tensor]:
    """The part as the model computes with it, laid out as it mostly is in memory, so that little is copied."""
    if name == "embed":
        for some in torch.arange(int(model.cfg.d_vocab), device=device_of(model)).split(ROWS):
            yield embed(model, some[None])[0]
    elif name.endswith((".w", "_norm.w")) and is_bridge(model) and getattr(model.cfg, "rmsnorm_uses_offset", False):
        yield 1.0 + stored.float()
    elif stored.ndim == 2:
        yield stored.T
    elif stored.ndim == 3:
        yield stored.permute(2, 0, 1) if name.endswith("W_O") else stored.transpose(1, 2)
    else:
        yield stored


# --- configuration and tokenizer --------------------------------------------------------------------------------------


def _kept_fields(fields: dict[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None), list, tuple, dict)
    return {name: value for name, value in fields.items() if name not in ASIDE and isinstance(value, plain)}


def _resolved(model: HookedModel) -> str:
    """The configuration as this class has it; of a bridge, Hugging Face's beside it."""
    inner = getattr(getattr(model, "original_model", None), "config", None)
    return digest_of(
        type(model).__name__, _kept_fields(vars(model.cfg)), _kept_fields(inner.to_dict()) if inner is not None else {}
    )


def _tokenizer(model: HookedModel) -> str:
    """Of the files that the tokenizer was loaded from, while it is as it was; else of all that it is."""
    loaded, now = getattr(model.cfg, "loaded", {}), _tokenizer_now(model)
    if loaded.get("tokenizer_now") == now:
        return str(loaded["tokenizer"])
    found = kept(model).found
    if ("tokenizer", now) not in found:
        backend = getattr(model.tokenizer, "backend_tokenizer", None)
        found["tokenizer", now] = digest_of(backend.to_str() if backend is not None else None, now)
    return str(found["tokenizer", now])


def _tokenizer_now(model: HookedModel) -> str:
    """What shows that a tokenizer was changed: its size, its steps and its special tokens."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = [
        repr(getattr(backend, name, None)) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    ]
    return digest_of(len(tokenizer), steps, {key: str(each) for key, each in tokenizer.special_tokens_map.items()})


# --- files of version 0.1.0 ------------------------------------------------------------------------------------------


@torch.no_grad()
def weight_hash(model: HookedModel) -> str:
    """What edit files of version 0.1.0 name a model by: SHA-256 of every W_out and of 64 embeddings, as float32."""
    digest = hashlib.sha256()
    for layer in range(int(model.cfg.n_layers)):
        weight = getattr(getattr(model.blocks[layer], "mlp", None), "W_out", None)
        if isinstance(weight, Tensor):
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    some = torch.arange(0, int(model.cfg.d_vocab), max(1, int(model.cfg.d_vocab) // 64), device=device_of(model))
    digest.update(embed(model, some[None]).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
