"""A weight of a block by one name on every model class, and the only place that saves weights and puts them back.

Names are TransformerLens's: `mlp.W_out` of layer 5 is `Weight(5, "mlp.W_out")` on a `HookedTransformer`, on a
`TransformerBridge`, and in Hugging Face's model, whatever that calls it. Changes of a weight are matrices [rows, columns],
from what the weight reads to what it writes; heads are laid side by side:

    mlp.W_in, mlp.W_gate   [d_model, d_mlp]             mlp.W_out   [d_mlp, d_model]
    attn.W_Q, W_K, W_V     [d_model, heads * d_head]    attn.W_O    [heads * d_head, d_model]
    biases                 [1, width]

With grouped queries, heads of W_K and W_V are the key-value heads. A weight may be a view into another tensor, so all writing
is in place: assigning `.data` of a view changes nothing, silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechedit import models
from mechedit.models import NAMES, HookedModel, ModelError

__all__ = [
    "NAMES",
    "Weight",
    "as_matrix",
    "as_stored",
    "check_shape",
    "is_used",
    "matrix_shape",
    "parameter_of",
    "part_of",
    "restored",
    "there",
    "value",
    "write_",
]

WRITE_PART = (
    1 << 18
)  # numbers that are widened, added to and rounded at once, so that they stay in the processor's cache


@dataclass(frozen=True, order=True)
class Weight:
    """A weight of block `layer` by its name, one of `NAMES`.

    Raises:
        ModelError: no such name.
    """

    layer: int
    name: str

    def __post_init__(self) -> None:
        if self.name not in NAMES or type(self.layer) is not int:
            raise ModelError(f"a weight is one of {', '.join(NAMES)}; found {self.name!r} of layer {self.layer!r}.")

    def __str__(self) -> str:
        return f"{self.name} of block {self.layer}"

    @property
    def part(self) -> str:
        """Its name among the parts of a model's identity."""
        return f"{self.layer}.{self.name}"


def value(model: HookedModel, weight: Weight) -> Tensor:
    """The model's own tensor, in TransformerLens's shape; it may be a view. Change it in place only, by `write_`.

    Raises:
        ModelError: no such block, or its model has no such weight.
    """
    found = models.find_weight(model, weight.layer, weight.name)
    if found is None:
        raise ModelError(
            f"{model.cfg.model_name} has no {weight}; it has {', '.join(there(model, weight.layer)) or 'none of those'}."
        )
    return found


def there(model: HookedModel, layer: int) -> tuple[str, ...]:
    """The names of the weights that a block has.

    Raises:
        ModelError: no such block.
    """
    return tuple(name for name in NAMES if models.find_weight(model, layer, name) is not None)


def is_used(model: HookedModel, weight: Weight) -> bool:
    """Whether the block has this weight, and not as a bias of zeros in the place of one that Hugging Face's model has not, as some
    classes have. A bias that Hugging Face's model has is one, zero or not; of a model that was not loaded here, one that is not zero.

    Raises:
        ModelError: no such block.
    """
    found = models.find_weight(model, weight.layer, weight.name)
    if found is None or not weight.name.partition(".")[2].startswith("b"):
        return found is not None
    return weight.part in getattr(model.cfg, "loaded", {}).get("biases", ()) or bool(found.detach().any())


def parameter_of(model: HookedModel, weight: Weight) -> torch.nn.Parameter:
    """The model's parameter that the weight is, or is a part of; errors as in `value`."""
    view = value(model, weight).detach()
    found = [each for each in model.parameters() if _overlaps(each, view)]
    if (
        found
    ):  # parameters may be parts of one memory themselves: the one that the weight is, before one that it is a part of
        return max(
            found, key=lambda each: (each.numel() == view.numel(), each.storage_offset() == view.storage_offset())
        )
    raise ModelError(f"{weight} of {model.cfg.model_name} is part of no parameter, so that it has no gradient.")


def _overlaps(parameter: Tensor, view: Tensor) -> bool:
    """Whether the view begins within the stretch of memory that the parameter takes."""
    begins = parameter.storage_offset()
    ends = begins + sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
    same = parameter.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
    return same and begins <= view.storage_offset() <= ends


def part_of(whole: Float[Tensor, ...], parameter: Float[Tensor, ...], stored: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """What of `whole`, a tensor of the parameter's shape, belongs to the weight whose tensor `stored` is part of the parameter."""
    if whole.stride() != parameter.stride():
        whole = torch.empty_strided(parameter.shape, parameter.stride(), dtype=whole.dtype, device=whole.device).copy_(whole)  # fmt: skip
    begins = whole.storage_offset() + stored.storage_offset() - parameter.storage_offset()
    return whole.as_strided(stored.shape, stored.stride(), begins)


def matrix_shape(model: HookedModel, weight: Weight) -> tuple[int, int]:
    """Rows and columns of the weight as a matrix; errors as in `value`."""
    rows, columns = as_matrix(weight, value(model, weight)).shape
    return rows, columns


def check_shape(model: HookedModel, weight: Weight, shape: tuple[int, ...]) -> None:
    """Raise unless a change of this shape is one of the model's weight.

    Raises:
        ModelError: it is not; errors as in `value`.
    """
    if shape != (own := matrix_shape(model, weight)):
        raise ModelError(
            f"the edit is for a {weight.name} of shape {list(shape)}, but that of block {weight.layer} of "
            f"{model.cfg.model_name} is {list(own)}. It was made for another model."
        )


def as_matrix(weight: Weight, stored: Float[Tensor, ...]) -> Float[Tensor, "rows columns"]:
    """A tensor of the weight's shape as a matrix; a view where it can be one."""
    return rearrange(stored, models.AS_MATRIX[weight.name])


def as_stored(weight: Weight, matrix: Float[Tensor, "rows columns"], like: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The matrix in the shape of `like`, a tensor of that weight."""
    before, after = models.AS_MATRIX[weight.name].split(" -> ")
    sizes = {"head": like.shape[0]} if "head" in before else {}
    return rearrange(matrix, f"{after} -> {before}", **sizes)


@torch.no_grad()
def write_(
    model: HookedModel,
    weight: Weight,
    base: Float[Tensor, ...],
    change: Float[Tensor, "rows columns"],
) -> None:
    """The weight becomes `base`, a tensor of its shape, plus the change, added in float64 and rounded once.

    Raises:
        ModelError: errors as in `value`, a change of another shape, or a sum that is no number. Nothing is written then.
    """
    target = value(model, weight)
    check_shape(model, weight, tuple(change.shape))
    _check_fits(weight, target.dtype, base, change)
    change = as_stored(weight, change.to(torch.float64), target)
    axis = max(range(target.ndim), key=target.stride)  # parts along it are whole stretches of memory
    rows = max(1, WRITE_PART * target.shape[axis] // max(1, target.numel()))
    device = torch.device("cpu") if target.is_mps else target.device  # which has no float64
    parts = (each.split(rows, axis) for each in (target, base, change))
    for into, own, added in zip(*parts, strict=True):
        into.copy_(own.to(device).double() + added.to(device))
    torch.clear_autocast_cache()  # it may hold the weight as it was, in another number format


def _check_fits(
    weight: Weight, dtype: torch.dtype, base: Float[Tensor, ...], change: Float[Tensor, "rows columns"]
) -> None:
    """Raise where a number of the sum could be none of the weight's format: NaN, or too large."""
    sizes = [
        float(torch.stack(tuple(each.detach().aminmax())).cpu().double().abs().max())
        for each in (base, change)
        if each.numel()
    ]
    if not sum(sizes) < torch.finfo(dtype).max:
        raise ModelError(
            f"what is written must be numbers below {torch.finfo(dtype).max:.2g}, but in {weight} a change of up to {sizes[-1]:.2g} would be "
            f"added to numbers of up to {sizes[0]:.2g}, and destroy the model. Find the edit again."
        )


@contextmanager
def restored(model: HookedModel, *weights: Weight) -> Iterator[dict[Weight, Tensor]]:
    """Run the body, which may write to these weights, then put back their exact values. It gets copies of them.

    Raises:
        ModelError: errors as in `value`, before the body runs.
    """
    tensors = {weight: value(model, weight) for weight in dict.fromkeys(weights)}
    with models.alone(model), models.as_they_were(model, list(tensors.values())):
        originals = {weight: tensor.detach().clone() for weight, tensor in tensors.items()}
        try:
            yield originals
        finally:
            put_back(model, originals)


@torch.no_grad()
def put_back(model: HookedModel, originals: Mapping[Weight, Float[Tensor, ...]]) -> None:
    """Write saved values into the model, bit for bit."""
    for weight, original in originals.items():
        value(model, weight).copy_(original)
    torch.clear_autocast_cache()
