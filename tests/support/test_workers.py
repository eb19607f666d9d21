"""The harness itself: what it returns, and what it says when ranks raise, hang or die."""

import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.support.workers import POOL, WorkersError, run

pytestmark = pytest.mark.gloo


def rank_and_world(shift: int) -> tuple[int, int]:
    return dist.get_rank() + shift, dist.get_world_size()


def summed(x: torch.Tensor) -> torch.Tensor:
    y = x * (dist.get_rank() + 1)
    dist.all_reduce(y)
    return y


def pid() -> int:
    return os.getpid()


def only_rank_1_raises() -> None:
    if dist.get_rank() == 1:
        print("about to raise")
        raise ValueError("only here")
    dist.barrier()


def all_raise() -> None:
    raise ValueError(f"on rank {dist.get_rank()}")


def rank_2_forgets_a_collective() -> None:
    if dist.get_rank() != 2:
        wait_for_rank_2()


def wait_for_rank_2() -> None:
    dist.all_reduce(torch.ones(1))


def rank_1_dies() -> None:
    if dist.get_rank() == 1:
        os.write(2, b"from below Python\n")
        os._exit(7)
    dist.barrier()


class Holder:
    """Holds groups, and itself: it is not free before Python looks for garbage."""

    last: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.itself, self.group = self, dist.new_group()


def leaves_groups_in_a_cycle() -> bool:
    Holder.last = weakref.ref(Holder())
    return Holder.last() is not None


def groups_are_left() -> bool:
    return Holder.last() is not None


def warns() -> None:
    warnings.warn("not tolerated", UserWarning, stacklevel=1)


def returns_a_lambda() -> Callable[[], None]:
    return lambda: None


def leaves() -> None:
    sys.exit("leaving")


def failure(world: int, fn: Callable[[], object], timeout: float = 60) -> str:
    with pytest.raises(WorkersError) as caught:  # callers look at the text
        run(world, fn, timeout=timeout)
    return str(caught.value)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 2])
def test_results_come_in_rank_order(world: int) -> None:
    assert run(world, rank_and_world, 10) == [(10 + rank, world) for rank in range(world)]


def test_tensors_go_both_ways() -> None:
    for y in run(3, summed, torch.tensor([1.0, 2.0])):
        torch.testing.assert_close(y, torch.tensor([6.0, 12.0]))


def test_workers_start_once() -> None:
    first = run(4, pid)
    started = POOL.started
    assert run(2, pid) == first[:2]
    assert run(4, pid) == first
    assert POOL.started == started


def test_groups_of_earlier_calls_are_gone() -> None:
    assert run(2, leaves_groups_in_a_cycle) == [True, True]
    assert run(2, groups_are_left) == [False, False]


def test_one_rank_raises_while_the_others_wait() -> None:
    run(3, pid)
    begin = time.monotonic()
    text = failure(3, only_rank_1_raises)
    assert time.monotonic() - begin < 15  # not the 60 s of the timeout
    assert "only_rank_1_raises on 3 ranks" in text
    assert "rank 1 raised ValueError: only here\n  rank 0 did not answer\n  rank 2 did" in text
    assert text.count(" in barrier") == 2
    assert "---- rank 1 printed ----\nabout to raise\n" in text
    assert run(3, rank_and_world, 0) == [(0, 3), (1, 3), (2, 3)]


def test_every_rank_that_raises_is_shown() -> None:
    text = failure(3, all_raise)
    for rank in range(3):
        assert f"rank {rank} raised ValueError: on rank {rank}" in text
        assert f"---- rank {rank} raised ----\nTraceback" in text


def test_a_hang_is_named_with_its_line() -> None:
    run(3, pid)
    text = failure(3, rank_2_forgets_a_collective, timeout=3)
    assert "(timeout 3 s):\n  rank 0 did not answer\n  rank 1 did not answer\n--" in text
    assert text.count(" in wait_for_rank_2") == 2
    assert run(3, rank_and_world, 0) == [(0, 3), (1, 3), (2, 3)]


def test_a_death_is_named_with_its_exit_code() -> None:
    text = failure(3, rank_1_dies)
    assert "rank 1 died with exit code 7" in text
    assert "---- rank 1 printed ----\nfrom below Python\n" in text
    assert run(3, rank_and_world, 0) == [(0, 3), (1, 3), (2, 3)]


def test_a_warning_is_an_error_in_workers() -> None:
    assert "rank 0 raised UserWarning: not tolerated" in failure(1, warns)


@pytest.mark.filterwarnings("ignore:not tolerated")
def test_the_filters_are_those_of_the_test() -> None:
    assert run(2, warns) == [None, None]


def test_what_cannot_travel_is_said() -> None:
    assert "Can't pickle" in failure(1, returns_a_lambda)
    assert "rank 0 raised SystemExit: leaving" in failure(1, leaves)
    with pytest.raises(AttributeError, match="local object"):
        run(1, lambda: None)
    with pytest.raises(ValueError, match=r"^run: world is 9; it must be 1 to 8$"):
        run(9, pid)
