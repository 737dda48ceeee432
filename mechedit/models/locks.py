"""One thread at a time: hooks, weights and gradient flags of a model are everyone's who has it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["alone"]

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """Let no other thread run or change the model through mechedit until the body ends."""
    with _MAKING:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield
