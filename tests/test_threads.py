"""Work side by side."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from mechedit.threads import side_by_side

pytestmark = pytest.mark.anywhere


@pytest.fixture
def four_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


def test_workers_are_at_it_together_with_a_share_of_the_threads_each_and_what_they_make_comes_in_order(four_threads):
    both = threading.Barrier(2, timeout=60)

    def work(piece):
        both.wait()  # breaks where one is done before the next begins
        time.sleep(0.05 * (4 - piece))
        return piece, torch.get_num_threads()

    assert list(side_by_side(work, range(4), 2)) == [(piece, 2) for piece in range(4)]
    assert torch.get_num_threads() == 4
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [4], "of threads that begin later too"


@pytest.mark.parametrize(("workers", "pieces"), [(1, 3), (2, 1), (2, 0)])
def test_with_one_worker_or_piece_no_thread_is_made(workers, pieces, four_threads):
    here = (threading.get_ident(), 4)
    found = list(side_by_side(lambda piece: (threading.get_ident(), torch.get_num_threads()), range(pieces), workers))
    assert found == [here] * pieces


def test_after_an_error_no_piece_is_begun_any_more_and_the_threads_are_as_they_were(four_threads):
    begun = []

    def work(piece):
        begun.append(piece)
        if piece == 0:
            raise ValueError("the first")
        time.sleep(0.2)

    with pytest.raises(ValueError, match="the first"):
        list(side_by_side(work, range(50), 2))
    assert len(begun) < 10
    assert torch.get_num_threads() == 4
