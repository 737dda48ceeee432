"""Work that threads do side by side, which is quicker than one piece at a time with all threads where each piece is small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

Piece = TypeVar("Piece")
Done = TypeVar("Done")


def side_by_side(work: Callable[[Piece], Done], pieces: Sequence[Piece], workers: int) -> Iterator[Done]:
    """What `work` makes of each piece, in their order. Of several workers each has its share of torch's threads, which stay as they are; after an
    error, or Ctrl-C, no piece is begun any more, and those that were begun are waited for."""
    if min(workers, len(pieces)) < 2:
        yield from map(work, pieces)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
        ) as pool:
            yield from pool.map(work, pieces)
    finally:
        torch.set_num_threads(threads)  # what a worker sets is what threads begin with
