"""What the weights of a block are called, and where a hooked model keeps them: the same names on every model class."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mechedit.models.surface import HookedModel, ModelError, check_layer

__all__ = ["AS_MATRIX", "NAMES", "biases_of", "find_weight", "stored_axes"]

NAMES = (
    *("mlp.W_in", "mlp.W_gate", "mlp.b_in", "mlp.W_out", "mlp.b_out"),
    *("attn.W_Q", "attn.b_Q", "attn.W_K", "attn.b_K", "attn.W_V", "attn.b_V", "attn.W_O", "attn.b_O"),
)
AS_MATRIX = {
    **dict.fromkeys(("attn.W_Q", "attn.W_K", "attn.W_V"), "head d_model d_head -> d_model (head d_head)"),
    "attn.W_O": "head d_head d_model -> (head d_head) d_model",
    **dict.fromkeys(("mlp.W_in", "mlp.W_gate", "mlp.W_out"), "rows columns -> rows columns"),
    **dict.fromkeys(("attn.b_Q", "attn.b_K", "attn.b_V"), "head d_head -> 1 (head d_head)"),
    **dict.fromkeys(("mlp.b_in", "mlp.b_out", "attn.b_O"), "width -> 1 width"),
}
"""From TransformerLens's shape of a weight to the matrix that it is: what it reads by what it writes, heads side by side."""

_QKV = ("attn.b_Q", "attn.b_K", "attn.b_V")
_WRITTEN: dict[
    str, dict[str, tuple[str, ...]]
] = {  # Hugging Face's modules of a block, by the last part of their names, and the biases that theirs is
    "attn": {
        **dict.fromkeys(("c_attn", "query_key_value", "qkv_proj", "Wqkv"), _QKV),
        **{name: (own,) for name, own in zip(("q_proj", "k_proj", "v_proj"), _QKV, strict=True)},
        **dict.fromkeys(("c_proj", "dense", "o_proj", "out_proj"), ("attn.b_O",)),
    },
    "mlp": {
        **dict.fromkeys(("c_fc", "fc_in", "fc1", "dense_h_to_4h", "up_proj"), ("mlp.b_in",)),
        **dict.fromkeys(("c_proj", "fc_out", "fc2", "dense_4h_to_h", "down_proj"), ("mlp.b_out",)),
    },
}


def biases_of(hf_model: Any) -> tuple[str, ...]:
    """The biases that Hugging Face's model has, as `LAYER.NAME`, zero or not; of architectures whose modules have none of the usual
    names, none."""
    found = []
    for name, _ in hf_model.named_parameters():
        *path, module, kind = name.split(".")
        layer = next((each for each in path if each.isdigit()), None)
        if kind == "bias" and layer is not None:
            part = "attn" if any("attn" in each or "attention" in each for each in path) else "mlp"
            found += [f"{layer}.{own}" for own in _WRITTEN[part].get(module, ())]
    return tuple(found)


def stored_axes(name: str) -> int:
    """How many axes TransformerLens's tensor of this name has."""
    return len(AS_MATRIX[name].split(" -> ")[0].split())


def find_weight(model: HookedModel, layer: int, name: str) -> Tensor | None:
    """The model's own tensor, which may be a view into another; None where the block has none of this name.

    Raises:
        ModelError: no such block, or no weight is called so.
    """
    if name not in AS_MATRIX:
        raise ModelError(f"a weight is one of {', '.join(NAMES)}; found {name!r}.")
    part, _, own = name.partition(".")
    module = getattr(model.blocks[check_layer(model, layer)], part, None)
    for attribute in (f"_{own}", own):  # with grouped queries `W_K` repeats `_W_K` for every query head
        found = getattr(module, attribute, None)
        if isinstance(found, Tensor) and found.ndim == stored_axes(name):  # experts have one axis more
            return found
    return None
