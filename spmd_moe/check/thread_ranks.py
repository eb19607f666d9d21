"""Ranks as threads of one process, over torch's process group for threads.

Every rank runs the real code with real values and its own integers, so rows may be as ragged as
they like. A world of 8 costs a few milliseconds. The process group is torch's own for its tests,
and private: it is used in this file only.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, final

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

# A function of C++ that torch does not annotate.
isolate: Callable[[bool], None] = vars(torch._C._distributed_c10d)["_set_thread_isolation_mode"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
SECONDS = 120.0  # after which ranks that are not done are taken to wait for each other for ever


@final
class RanksError(RuntimeError):
    """Some ranks failed or did not finish; `errors` holds the exception of each rank."""

    def __init__(self, text: str, errors: dict[int, BaseException], stuck: list[int]) -> None:
        super().__init__(text)
        self.errors, self.stuck = errors, stuck


def threaded(world: int, fn: Callable[[*Ts], T], *args: *Ts, seconds: float = SECONDS) -> list[T]:
    """Run `fn(*args)` on every rank, each in a thread; returns their results in rank order."""
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            results[rank] = fn(*args)
        except BaseException as error:
            errors[rank] = error
            _wake(error)
        finally:
            dist.destroy_process_group()

    hook = sys.excepthook  # torch puts a rank's name before it, and leaves it there
    isolate(True)
    _install_threaded_pg()
    store = dist.HashStore()
    try:
        ranks = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world)]
        for thread in ranks:
            thread.start()
        stuck = _join(ranks, seconds)
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        isolate(False)
        sys.excepthook = hook
    if errors:
        raise _failed(world, errors, stuck)
    return [results[rank] for rank in range(world)]


def _join(ranks: list[threading.Thread], seconds: float) -> list[int]:
    """Wait for all threads; returns the ranks that had to be woken."""
    end = time.monotonic() + seconds
    for thread in ranks:
        thread.join(max(0.0, end - time.monotonic()))
    stuck = [rank for rank, thread in enumerate(ranks) if thread.is_alive()]
    if stuck:
        _wake(TimeoutError())
        for thread in ranks:
            thread.join(5.0)
    return stuck


def _wake(error: BaseException) -> None:
    """Wake the ranks that wait for one that failed. Another may enter a collective meanwhile."""
    for _ in range(1000):
        try:
            ProcessLocalGroup.exception_handle(error)
            return
        except RuntimeError:  # "dictionary changed size during iteration"
            continue


def _failed(world: int, errors: dict[int, BaseException], stuck: list[int]) -> RanksError:
    # A rank that was woken because of another one's error leaves with SystemExit.
    own = {r: e for r, e in errors.items() if not isinstance(e, SystemExit)}
    if not own and stuck:
        return RanksError(f"ranks {stuck} of {world} wait for ever", errors, stuck)
    own = own or errors
    first = min(own)
    trace = "".join(traceback.format_exception(own[first]))
    return RanksError(f"ranks {sorted(own)} of {world} failed; rank {first}:\n{trace}", own, [])
