"""Reports of hangs: which rank has not arrived, and where the other ranks wait.

If a rank stops, the others wait in a collective, without a message, until torch's timeout of many
minutes. `watch_hangs` starts two threads on each rank. One writes the step of the rank and the line
of its main thread into the store that connects the ranks, every second. The other compares the time
since the last step with the longest step so far. If it exceeds the limit, the rank reads the
records of the others, prints a message, and ends its process.

A rank that leaves with an error writes it into the store, so ranks that wait for it print it too.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import final

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from spmd_moe.core.messages import printable
from spmd_moe.core.per_rank_work import is_simulating
from spmd_moe.core.validate import check_number
from spmd_moe.train.hang_report import (
    Beat,
    Beats,
    FirstError,
    Ranks,
    State,
    message,
    store_is_silent,
)
from spmd_moe.train.hang_stack import standing

HUNG = 75  # the exit status: EX_TEMPFAIL, since the same job may work when started again
AFTER_AN_ERROR = 5.0  # seconds that a rank may go on after another one has raised
LINGER = 5.0  # seconds in which all ranks print, before the first of them ends
BEAT = 1.0  # seconds
_FIRST_ERROR, _HANG = "first_error", "hang"


@contextmanager
def watch_hangs(*, seconds: float = 30.0, first_seconds: float = 300.0) -> Iterator[HangWatch]:
    """Watch a training loop: if a rank stops, all waiting ranks print which one, and end.

    Every rank of the job must enter it, and call `step()` once in each step. A rank that makes no
    step for `seconds` longer than its longest step so far prints which ranks have not arrived, in
    which collective and at which line each rank stands, and ends its process with status 75. When
    a rank leaves with an error, ranks that still wait 5 seconds later print that error and end.
    In a job of one process nothing is watched.

    Args:
        seconds: The time beyond the longest step so far.
        first_seconds: The time for the first step, in which programs compile.

    Returns:
        A context manager of the watch, which has `step()` and `pause()`.

    Raises:
        ConfigError: `seconds` or `first_seconds` is not a positive number.

    Example:
        >>> from spmd_moe import watch_hangs
        >>> with watch_hangs(seconds=30) as watch:
        ...     for step in range(3):
        ...         watch.step()  # after forward, backward and the optimizer
        ...     with watch.pause():
        ...         pass  # evaluation, or saving a checkpoint
    """
    for name, value in {"seconds": seconds, "first_seconds": first_seconds}.items():
        check_number(
            "watch_hangs",
            name,
            value,
            lambda number: 0 < number < threading.TIMEOUT_MAX,
            need="a positive number of seconds",
            why="a step may take this much longer than the longest step so far",
            fix=f"watch_hangs({name}=30)",
        )
    watch = HangWatch(seconds, max(seconds, first_seconds))
    if not _has_other_processes():
        yield watch
        return
    threads = _Threads(watch)
    try:
        yield watch
    except SystemExit as error:
        threads.leave(f"SystemExit: {error.code}" if error.code else None)
        raise
    except BaseException as error:
        first = threads.leave(_first_line(error))
        if first is not None:
            error.add_note(f"watch_hangs: before that, rank {first.rank} raised {first.error}")
        raise
    threads.leave(None)


@final
class HangWatch:
    """The methods that the training loop calls; made by `watch_hangs`."""

    def __init__(self, seconds: float, first_seconds: float) -> None:
        self.seconds = seconds
        self.first_seconds = first_seconds
        self.steps = 0
        self.longest = 0.0
        self.paused = 0
        self.since = time.monotonic()

    def step(self) -> None:
        """The end of a step. It takes less than a microsecond."""
        now = time.monotonic()
        if now - self.since > self.longest:
            self.longest = now - self.since
        self.steps += 1
        self.since = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Work of unknown length that is no step, on one rank or on all.

        It has no time limit, but a rank whose process stops in it is still found.
        """
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1
            self.since = time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds that this rank may be without a step."""
        return self.longest + self.seconds if self.steps else self.first_seconds


@final
@dataclass(slots=True)
class _Heard:
    """What the first thread has read, for the second."""

    at: float  # when the store answered last
    readings: list[tuple[float, Beats]]
    wanted: bool = False
    first_error: FirstError | None = None
    error_at: float = 0.0
    hang: bool = False


@final
class _Threads:
    """The two threads of a rank. Only the first uses the store, since a store may not answer."""

    def __init__(self, watch: HangWatch) -> None:
        self.watch = watch
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.main = threading.get_ident()
        self.period = min(BEAT, watch.seconds / 4)
        self.heard = _Heard(time.monotonic(), [])
        self.state = State.RUNS
        self.error: str | None = None
        self.number = 0
        self.host = socket.gethostname()
        self.hangs = False
        self.apart = max(4 * self.period, 2.0)  # of two readings
        self.ended = threading.Event()
        shared = _get_default_store()
        # Every watch of the job has a number of its own, the same on all ranks.
        mine = shared.add(f"spmd_moe/hangs/watches of rank {self.rank}", 1)
        self.store = dist.PrefixStore(f"spmd_moe/hangs/{mine}", shared.clone())  # type: ignore[attr-defined]  # torch's stubs lack it
        self.store.set_timeout(timedelta(seconds=LINGER))
        self._say()
        names = ("says", "judges")
        self.says, self.judges = (
            threading.Thread(target=target, name=f"watch_hangs {name}", daemon=True)
            for name, target in zip(names, (self._keep_saying, self._judge), strict=True)
        )
        self.says.start()
        self.judges.start()

    def leave(self, error: str | None) -> FirstError | None:
        """Say so, and return the error of the rank that raised before this one."""
        self.error = error
        self.state = State.LEFT if error is None else State.RAISED
        self.ended.set()
        self.says.join(LINGER)
        self.judges.join(LINGER)
        first = self.heard.first_error
        if error is not None and _holds_the_store():
            time.sleep(2 * self.period)  # others have yet to read it
        return first if first is not None and first.rank != self.rank else None

    # --- the first thread -------------------------------------------------------------------------

    def _keep_saying(self) -> None:
        while True:
            leaves = self.ended.wait(self.period)
            try:
                if self.error is not None:
                    mine = f"{self.rank} {self.error}"
                    self.store.compare_set(_FIRST_ERROR, "", mine)
                if self.hangs:
                    self.store.set(_HANG, str(self.rank))
                self._say()
                self._listen()
                self.heard.at = time.monotonic()
            except RuntimeError:  # the store does not answer: the second thread reports it
                pass
            if leaves:
                return

    def _say(self) -> None:
        self.number += 1
        state = State.PAUSED if self.watch.paused and self.state is State.RUNS else self.state
        stands = standing(self.main)
        beat = Beat(
            self.number,
            state,
            self.watch.steps + 1,
            os.getpid(),
            self.host,
            stands.collective,
            stands.inside,
            stands.at,
        )
        self.own = beat
        self.store.set(str(self.rank), beat.encode())

    def _listen(self) -> None:
        heard = self.heard
        if heard.first_error is None and self.store.check([_FIRST_ERROR]):
            rank, error = self.store.get(_FIRST_ERROR).decode().split(" ", 1)
            heard.error_at, heard.first_error = time.monotonic(), FirstError(int(rank), error)
        heard.hang = heard.hang or self.store.check([_HANG])
        if heard.wanted:
            heard.readings.append((time.monotonic(), self._beats()))

    def _beats(self) -> Beats:
        names = [str(rank) for rank in range(self.world)]
        if not self.store.check(names):
            names = [name for name in names if self.store.check([name])]
        texts = self.store.multi_get(names)
        return {int(name): Beat.decode(text) for name, text in zip(names, texts, strict=True)}

    # --- the second thread ------------------------------------------------------------------------

    def _judge(self) -> None:
        """Look whether this rank, or another one, has been without a step for too long."""
        excused, began, previous = 0.0, self.watch.since, time.monotonic()
        while not self.ended.wait(self.period / 2):
            now, since = time.monotonic(), self.watch.since
            if since != began:
                began, excused = since, 0.0
            if now - previous > 2 * self.period:  # this process itself was stopped
                excused += now - previous
            previous = now
            if not self._overdue(now - since - excused, now, since):
                continue
            ranks = self._read_all()
            if self.ended.is_set():
                return
            if ranks is not None and not self.heard.hang:
                if self.watch.since != since and ranks.first_error is None:
                    continue  # it made a step meanwhile
                if ranks.only_waits:
                    excused += self.watch.seconds
                    continue
            self._tell(ranks, time.monotonic() - since)

    def _overdue(self, without_step: float, now: float, since: float) -> bool:
        heard = self.heard
        if heard.hang:
            return True
        if heard.first_error is not None:
            patience = min(AFTER_AN_ERROR, self.watch.seconds)
            return now - max(heard.error_at, since) > patience
        return without_step > self.watch.limit

    def _read_all(self) -> Ranks | None:
        """Two readings, far enough apart for every living rank to write. None: no answer."""
        heard = self.heard
        heard.readings, heard.wanted = [], True
        deadline = time.monotonic() + self.apart + LINGER
        try:
            while time.monotonic() < deadline and not self.ended.wait(self.period / 4):
                readings = heard.readings
                if readings and readings[-1][0] - readings[0][0] >= self.apart:
                    first, last = readings[0][1], readings[-1][1]
                    return Ranks.of(self.world, first, last, heard.first_error)
        finally:
            heard.wanted = False
        return None

    def _tell(self, ranks: Ranks | None, without_step: float) -> None:
        """Print the message once all ranks have been asked for theirs, and end the process."""
        if ranks is None:
            silent = time.monotonic() - self.heard.at
            text = store_is_silent(self.rank, self.world, self.own, without_step, silent)
        else:
            text = message(self.rank, ranks, without_step, self.watch.longest)
        os.write(2, f"{text}\n".encode())  # the main thread may hold the lock of sys.stderr
        if ranks is not None:
            self._wait_until_all_have_told(ranks)
        os._exit(HUNG)

    def _wait_until_all_have_told(self, ranks: Ranks) -> None:
        """The end of one process makes launchers end the others, so the first one waits."""
        others = set(ranks.alive(State.RUNS, State.PAUSED)) - {self.rank}
        self.state, self.hangs, self.heard.wanted = State.TELLS, True, True
        deadline = time.monotonic() + 2 * self.period + self.apart + LINGER
        while time.monotonic() < deadline:
            time.sleep(self.period / 4)
            beats = self.heard.readings[-1][1] if self.heard.readings else ranks.beats
            if all(beats[r].state not in (State.RUNS, State.PAUSED) for r in others):
                break
        time.sleep(2 * self.period)  # until the others have read that this rank has told


def _has_other_processes() -> bool:
    """Other ranks of this job run in processes of their own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return not is_simulating() and dist.get_backend() != "fake"


def _holds_the_store() -> bool:
    """Rank 0 does, except under torchrun, whose agent does."""
    return dist.get_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)
