"""What every model has here, whichever class of TransformerLens it is of.

Both classes expose `cfg`, `tokenizer`, `hooks`, `forward(stop_at_layer=)`, hook names and `blocks[l].mlp.W_out`, the matrix
[d_mlp, d_model] that an edit changes. The functions of this file read those and raise a `ModelError` where one is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.errors import MecheditError
from mechedit.models.locks import alone

__all__ = [
    "HookedModel",
    "ModelError",
    "W_out",
    "b_out",
    "cast",
    "check_layer",
    "device_of",
    "embed",
    "embedding_std",
    "frozen",
    "has_post_mlp_norm",
    "is_bridge",
    "mlp_module",
    "norm_after_mlp",
    "rotated",
]

if TYPE_CHECKING:
    HookedModel: TypeAlias = Any  # two classes without a common base that has cfg, tokenizer and hooks
else:
    HookedModel = torch.nn.Module


class ModelError(MecheditError, ValueError):
    """A model that cannot be loaded, or that lacks what was asked of it."""


def is_bridge(model: HookedModel) -> bool:
    """Whether this is a `TransformerBridge` (TransformerLens 4), which wraps Hugging Face's own modules."""
    return hasattr(model, "original_model")


def device_of(model: HookedModel) -> torch.device:
    """The device of the model's embeddings, where tokens belong."""
    return next(model.parameters()).device


def check_layer(model: HookedModel, layer: int) -> int:
    """`layer` itself, if the model has such a block.

    Raises:
        ModelError: there is no such block.
    """
    n = int(model.cfg.n_layers)
    if not isinstance(layer, SupportsIndex):
        raise ModelError(f"layer must be a whole number from 0 to {n - 1}; found {layer!r}.")
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


def norm_after_mlp(model: HookedModel, layer: int) -> torch.nn.Module | None:
    """The norm between W_out's output and the residual stream, if there is one."""
    block = model.blocks[check_layer(model, layer)]
    norm = getattr(block, "ln2_post", block.ln2) if has_post_mlp_norm(model, layer) else None
    assert norm is None or isinstance(norm, torch.nn.Module)
    return norm


def rotated(model: HookedModel) -> int:
    """How many numbers of a head's queries and keys, from its first, are turned by their position; 0 where positions are embedded."""
    if str(model.cfg.positional_embedding_type) != "rotary":
        return 0
    if not is_bridge(model):
        return int(model.cfg.rotary_dim or model.cfg.d_head)
    found = [2 * len(buffer) for name, buffer in model.original_model.named_buffers() if name.endswith("inv_freq")]
    return min([*found, int(model.cfg.d_head)])


def embed(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """Token embeddings as `hook_embed` sees them: before positions, after the model's own scaling."""
    with alone(model):
        return model.embed(tokens)


@torch.no_grad()
def embedding_std(model: HookedModel) -> float:
    """The standard deviation of all entries of all the vocabulary's embeddings, as `hook_embed` sees them."""
    n, total, squares = 0, 0.0, 0.0
    for chunk in torch.arange(int(model.cfg.d_vocab), device=device_of(model)).split(16384):
        values = embed(model, chunk[None]).cpu().double()
        n, total, squares = n + values.numel(), total + float(values.sum()), squares + float(values.square().sum())
    return ((squares - total * total / n) / (n - 1)) ** 0.5


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """Within the block no parameter collects a gradient; afterwards each is as it was."""
    with alone(model):
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def plainly(model: HookedModel) -> Iterator[None]:
    """Within the block nothing of what stands around it bears on numbers or slopes: neither autocast nor inference mode."""
    with torch.inference_mode(False), torch.autocast(device_of(model).type, enabled=False):
        yield


@contextmanager
def cast(model: HookedModel, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the model computes in `dtype`; afterwards it has its own weights and tables again, bit for bit.

    Hugging Face's rotary frequencies, which a model that was loaded in `dtype` would have in float32 too, stay as they are.
    """
    with alone(model):
        parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
        originals = [(parameter, parameter.data) for parameter in parameters]
        buffers = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
        configured = model.cfg.dtype
        try:
            for parameter, data in originals:
                parameter.data = data.to(dtype)  # layout is kept, so transposed weights stay so
            for now, then in buffers:
                now.update({name: buffer.to(dtype) for name, buffer in then.items() if _is_rounded(name, buffer)})
            model.cfg.dtype = dtype
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data
            for now, then in buffers:  # a longer prompt may have put a longer table in one's place
                now.clear()
                now.update(then)
            model.cfg.dtype = configured


def _is_rounded(name: str, buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point() and not name.endswith("inv_freq")


@contextmanager
def without_forward_hooks(model: HookedModel) -> Iterator[None]:
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
