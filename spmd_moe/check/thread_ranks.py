"""Ranks as threads of one process, over torch's process group for threads.

Every rank runs the real code with real values and its own integers, so rows may be as ragged as
they like. A world of 8 costs a few milliseconds. The process group is torch's own for its tests,
and private: it is used in this file only.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple, final

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from spmd_moe.core.messages import short_path

# A function of C++ that torch does not annotate.
isolate: Callable[[bool], None] = vars(torch._C._distributed_c10d)["_set_thread_isolation_mode"]


T = TypeVar("T")
Ts = TypeVarTuple("Ts")
GRACE = 5.0  # for the ranks that did not fail, once another has
SECONDS = 120.0  # after which ranks that are not done are taken to be deadlocked


@final
class RanksError(RuntimeError):
    """Some ranks failed, or did not come to an end; `errors` has what each of them raised.

    `where` is the line of the checked code at which the first rank that is stuck waits.
    """

    def __init__(
        self, text: str, errors: dict[int, BaseException], stuck: list[int], where: str = ""
    ) -> None:
        super().__init__(text)
        self.errors, self.stuck, self.where = errors, stuck, where


def threaded(world: int, fn: Callable[[*Ts], T], *args: *Ts, seconds: float = SECONDS) -> list[T]:
    """Run `fn(*args)` on every rank, each in a thread; returns their results in rank order."""
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    failed = threading.Event()

    def work(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = fn(*args)
        except BaseException as error:
            errors[rank] = error
            failed.set()
            _wake(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    hook = sys.excepthook  # torch puts a rank's name before it, and leaves it there
    isolate(True)
    _install_threaded_pg()
    store = dist.HashStore()
    try:
        ranks = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world)]
        for thread in ranks:
            thread.start()
        stuck, where = _join(ranks, failed, seconds)
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        isolate(False)
        sys.excepthook = hook
    if errors or stuck:
        raise _failed(world, errors, stuck, where)
    return [results[rank] for rank in range(world)]


def _join(
    ranks: list[threading.Thread], failed: threading.Event, seconds: float
) -> tuple[list[int], str]:
    """Wait for all; the ranks that had to be ended because they waited without end, and where."""
    end = time.monotonic() + seconds
    for thread in ranks:
        while thread.is_alive() and time.monotonic() < end:
            thread.join(0.05 if failed.is_set() else 0.5)
            if failed.is_set():  # the others are awake, and have a moment to come to their end
                end = min(end, time.monotonic() + GRACE)
                failed.clear()
    stuck = [rank for rank, thread in enumerate(ranks) if thread.is_alive()]
    where = next(filter(None, (_line_of(ranks[rank]) for rank in stuck)), "")
    if stuck:
        _wake(TimeoutError())
        for thread in ranks:
            thread.join(1.0)
        for thread in ranks:  # what waits in no collective: a loop, or a store of torch's
            if thread.is_alive() and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
                )
        for thread in ranks:
            thread.join(1.0)
    return stuck, where


def _line_of(thread: threading.Thread) -> str:
    """The innermost line outside torch, the checker, and Python's own files."""
    frame = sys._current_frames().get(thread.ident or 0)
    here, theirs = str(Path(__file__).parent), str(Path(torch.__file__).parent)
    own = (here, theirs, str(Path(threading.__file__).parent / "threading.py"))
    while frame is not None and frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    return f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""


def _wake(error: BaseException) -> None:
    """Wake the ranks that wait for one that failed. Another may enter a collective meanwhile."""
    for _ in range(1000):
        try:
            ProcessLocalGroup.exception_handle(error)
            return
        except RuntimeError:  # "dictionary changed size during iteration"
            continue


def _failed(
    world: int, errors: dict[int, BaseException], stuck: list[int], where: str
) -> RanksError:
    # A rank that was woken because of another one's error leaves with SystemExit.
    own = {r: e for r, e in errors.items() if not isinstance(e, SystemExit)}
    if not own:
        stuck = stuck or sorted(errors)
        return RanksError(f"ranks {stuck} of {world} wait without end", {}, stuck, where)
    first = min(own)
    trace = "".join(traceback.format_exception(own[first]))
    return RanksError(f"ranks {sorted(own)} of {world} failed; rank {first}:\n{trace}", own, [])
