"""What is kept with a model while it lives, and what shows that the model changed.

What was computed from a model holds until a parameter changes. A change shows in a parameter's version counter, its place in
memory and a few of its numbers, and in the modules that the model is made of; to look at all of them takes one to three
milliseconds at GPT-2 XL's size. One change cannot be seen so: a write through `.data` that misses those numbers.
`forget(model)` is for who writes so.

Nothing here changes a model, or keeps it alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from mechedit.models.surface import HookedModel, ModelError

__all__ = ["Kept", "Watch", "as_they_were", "check_plain", "dropping", "forget", "hooked", "kept", "remembered", "told"]

OWN = (
    "transformer_lens.model_bridge",
    "transformers.",
)  # whose hooks bridges and their models put on themselves, to read what passes
LIBRARIES = ("transformer_lens.", "transformers.", "torch.")
SEEN = 4  # numbers of each parameter that are looked at: each costs a walk to memory
REMEMBERED = 64  # things of one kind that were found out about a model
Value = TypeVar("Value")


@dataclass
class Kept:
    """Of one model: its parameters when last looked at and the digests of its parts then, what else was found out
    about it, the edits that are in it, in order, and those whose text stands before its prompts, whatever became of its weights."""

    watch: Watch | None = None
    digests: dict[str, str] = field(default_factory=dict)
    identity: Any = None  # as it was last made
    found: dict[Any, Any] = field(default_factory=dict)
    applied: list[Any] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)


_KEPT: WeakKeyDictionary[torch.nn.Module, Kept] = WeakKeyDictionary()


def kept(model: HookedModel) -> Kept:
    """What is kept with this model."""
    return _KEPT.setdefault(model, Kept())


def told(model: HookedModel) -> str:
    """The text that stands before every prompt of this model: that of the edits in it which tell it something."""
    return "".join(each.told for each in kept(model).told)


def forget(model: HookedModel) -> None:
    """Let everything that was found out about the model be found out again."""
    own = kept(model)
    own.watch, own.digests = None, {}
    own.found.clear()


def hooked(model: HookedModel) -> bool:
    """Whether there is any hook on the model, a module whose `forward` somebody replaced, or dropout at work. Then its numbers are not
    those of its parameters alone, and are not kept."""
    return (
        replaced(model) != ""
        or dropping(model) != ""
        or any(
            not str(getattr(hook, "__module__", "")).startswith(OWN)
            for module in model.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            for hook in getattr(module, kind).values()
        )
    )


def replaced(model: HookedModel) -> str:
    """The module whose own `forward`, set on the object, comes from neither library; empty where there is none."""
    for name, module in model.named_modules():
        own = vars(module).get("forward")
        if own is not None and not str(getattr(own, "__module__", "")).startswith(LIBRARIES):
            return name or "the model"
    return ""


def dropping(model: HookedModel) -> str:
    """The dropout that draws anew in every run, as it does in training; empty where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p:
            return name
    return ""


def check_plain(model: HookedModel) -> None:
    """Raise where there are hooks on the model, before blocks are run on some of a prompt's positions: hooks would be handed these; so
    would a `forward` that took a module's place. Raise too where dropout is at work, by which no number comes again.

    Raises:
        ModelError: there are.
    """
    if name := dropping(model):
        raise ModelError(
            f"{model.cfg.model_name} is in training mode: its dropout {name} draws anew in every run, and so would all that is found. Call model.eval() first."
        )
    if name := replaced(model):
        raise ModelError(
            f"the forward of {name} in {model.cfg.model_name} was replaced. Its blocks are to be run on some positions of a prompt at a "
            "time, which it would take for the whole. Put it back (del module.forward); what is to be changed in every run can be a "
            "component of tracing, or be written into the weights."
        )
    if hooked(model):
        raise ModelError(
            f"there are hooks on {model.cfg.model_name}. Its blocks are to be run on some positions of a prompt at a time, which hooks "
            "would take for the whole. Take them off (model.reset_hooks()); what is to be changed in every run can be a component of "
            "tracing, or be written into the weights."
        )


def remembered(model: HookedModel, key: tuple[Any, ...], make: Callable[[], Value], *, most: int = REMEMBERED) -> Value:
    """What `make` gives, made once for the model and the key, which must hold all that it depends on; with hooks, each time.

    The key begins with what kind of thing it is; of a kind, the latest `most` are remembered.
    """
    if hooked(model):
        return make()
    found = kept(model).found
    if key not in found:
        made = make()
        for old in [each for each in found if each[0] == key[0]][: -most + 1 or None]:
            del found[old]
        found[key] = made
    return found[key]


class Watch:
    """The parameters of a model as they were when this was made, by what shows a change."""

    def __init__(self, model: HookedModel) -> None:
        modules = list(model.modules())
        self._trees = [
            (module._modules, tuple(map(id, module._modules.values()))) for module in modules if module._modules
        ]
        places = [(module._parameters, name) for module in modules for name in module._parameters]
        self._places = [(own, name, own[name]) for own, name in places if own[name] is not None]
        self.tensors: list[Tensor] = [tensor for _, _, tensor in self._places]
        self._pointers = [tensor.data_ptr() for tensor in self.tensors]
        self._storages = [tensor.untyped_storage().data_ptr() for tensor in self.tensors]
        self._versions = [tensor._version for tensor in self.tensors]
        self._few = [_few(tensor.detach()) for tensor in self.tensors]
        self._numbers = self._look()
        self.named: dict[str, Tensor] = {}  # the parts of an identity, which are these parameters or views of them

    def storages(self, which: Sequence[int]) -> set[int]:
        """Where the parameters of these numbers are in memory."""
        return {self._storages[index] for index in which}

    def _look(self) -> list[bytes]:
        """Some numbers of each parameter, as they are in memory: quicker, for hundreds of parameters, than any one call of torch."""
        return [few.tobytes() if isinstance(few, np.ndarray) else few.cpu().numpy().tobytes() for few in self._few]

    def is_of_all(self) -> bool:
        """Whether the model still consists of these parameters."""
        return all(own.get(name) is tensor for own, name, tensor in self._places) and all(
            tuple(map(id, tree.values())) == ids for tree, ids in self._trees
        ) and self._pointers == [tensor.data_ptr() for tensor in self.tensors]  # fmt: skip

    def written(self) -> list[int]:
        """The parameters, by number, that were written to since."""
        versions = [tensor._version for tensor in self.tensors]
        found = {index for index, (now, then) in enumerate(zip(versions, self._versions, strict=True)) if now != then}
        found |= {
            index for index, (now, then) in enumerate(zip(self._look(), self._numbers, strict=True)) if now != then
        }
        return sorted(found)

    def seen(self) -> tuple[list[int], list[bytes]]:
        """Version counters and numbers as they were last looked at."""
        return list(self._versions), self._numbers

    def settle(self, tensors: Sequence[Float[Tensor, ...]], seen: tuple[list[int], list[bytes]]) -> None:
        """Take what shares memory with these tensors to be as it was when `seen` was; the rest is told from then."""
        self._versions, self._numbers = list(seen[0]), seen[1]
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        for index, storage in enumerate(self._storages):
            if storage in storages:
                self._versions[index] = self.tensors[index]._version

    def look_again(self) -> None:
        """From now on, a change is one from how the parameters are now."""
        self._versions = [tensor._version for tensor in self.tensors]
        self._numbers = self._look()


def _few(tensor: Tensor) -> Tensor | np.ndarray:
    """A view of some numbers of the tensor, spread over its memory, as whole numbers of their size."""
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    n = min(SEEN, tensor.numel())
    if not n:
        return np.empty(0)
    some = tensor.as_strided((n,), (max(1, min(room, tensor.numel()) // n),)).view(_WHOLE[tensor.element_size()])
    return some.numpy() if some.device.type == "cpu" else some


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def as_they_were(
    model: HookedModel, tensors: Sequence[Float[Tensor, ...]], *, looked_at: bool = False
) -> Iterator[None]:
    """The body writes to these tensors, and puts them back bit for bit: what was known of the model before holds after it.

    `looked_at` says that the identity was asked for just before.
    """
    own = kept(model)
    watch = own.watch if own.watch is not None and (looked_at or not own.watch.written()) else None
    digests, seen = own.digests, watch.seen() if watch is not None else None
    try:
        yield
    finally:
        if watch is not None and seen is not None and watch is own.watch:
            own.digests = digests
            watch.settle(tensors, seen)
