"""All ranks of a world as threads of one process, over torch's process group for threads.

Every rank runs the real code with its own integers, so rows may be as ragged as they like. That is
why the layer is simulated here and not under LocalTensorMode (`simulate.py`), where one tensor
stands for all ranks: there a size that differs between ranks cannot be compared, and the layer's
sizes differ. A world of 8 costs a few milliseconds.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

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


def wake(error: BaseException) -> None:
    """Wake the ranks that wait for one that failed. Another may enter a collective meanwhile."""
    for _ in range(1000):
        try:
            ProcessLocalGroup.exception_handle(error)
            return
        except RuntimeError:  # "dictionary changed size during iteration"
            continue


def threaded(world: int, fn: Callable[[*Ts], T], *args: *Ts) -> list[T]:
    """`fn(*args)` on every rank, each in a thread; what the ranks return, in their order."""
    results: dict[int, T] = {}
    failures: dict[int, str] = {}

    def work(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            results[rank] = fn(*args)
        except BaseException as error:
            failures[rank] = traceback.format_exc()
            wake(error)
        finally:
            dist.destroy_process_group()

    isolate(True)
    _install_threaded_pg()
    store = dist.HashStore()
    try:
        ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        isolate(False)
    if failures:
        first = min(failures)
        raise RuntimeError(
            f"ranks {sorted(failures)} of {world} failed; rank {first}:\n{failures[first]}"
        )
    return [results[rank] for rank in range(world)]
