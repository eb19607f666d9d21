"""Work in child processes that always end: late ones are killed, lost ones are reported.

Each child runs in a session of its own, so Ctrl-C reaches the parent alone, and every process that
the child started is killed with it. What a child prints goes to stderr. Results come back through a
socket in frames, which are read as far as they have come: no child can make the parent wait.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import re
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, Generic, NoReturn, TypeVar, final

from spmd_moe.core.messages import is_users, short_path

T = TypeVar("T")
R = TypeVar("R")
# What a child does first: it returns the work, and tells a line of the user's code on the way.
Start = Callable[[Callable[[str], None]], Callable[[T], R]]
_LENGTH = struct.Struct("!Q")
_NUMBER = struct.Struct("!I")


@final
class LostError(Exception):
    """A child did not finish a piece of work. `how` says what happened, `at` is the line if known.

    `step` is the piece of work, or None while the child was starting; `late` means that the parent
    killed it at its deadline.
    """

    def __init__(self, step: object, how: str, at: str, late: bool = False) -> None:
        super().__init__(how)
        self.step, self.how, self.at, self.late = step, how, at, late


@final
class FailedError(Exception):
    """A child raised an error; the text is what `describe` made of it there."""


@final
@dataclass(eq=False, slots=True)
class _Child:
    pid: int
    channel: socket.socket
    stacks: IO[bytes]  # where faulthandler writes
    deadline: float
    step: int | None = None  # None while it starts
    received: bytearray = field(default_factory=bytearray)


@final
class Supervisor(Generic[T, R]):
    """Runs one piece of work for each item in `jobs` children, each within `seconds`."""

    def __init__(
        self,
        start: Start[T, R],
        items: Sequence[T],
        *,
        jobs: int,
        seconds: float,
        describe: Callable[[BaseException], str],
    ) -> None:
        self.start, self.items, self.seconds, self.describe = start, items, seconds, describe
        self.jobs = max(1, min(jobs, len(items)))
        self.at = ""  # the line that the children's start told
        self._children: list[_Child] = []
        self._next = 0  # the first item that no child has
        self._done: dict[int, R] = {}

    def results(self) -> Generator[R, None, None]:
        """The result for each item, in their order, as soon as they are there.

        Raises:
            LostError: A child died, or did not finish in time.
            FailedError: A child raised an error.
        """
        try:
            for _ in range(self.jobs):
                self._children.append(self._fork())
            for number in range(len(self.items)):
                while number not in self._done:
                    self._wait()
                yield self._done.pop(number)
        finally:
            for child in self._children:
                _kill(child)

    # --- the parent -----------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait until a child says something, dies or is late."""
        now = time.monotonic()
        rest = min(child.deadline for child in self._children) - now
        channels = {child.channel: child for child in self._children}
        readable, _, _ = select.select(list(channels), [], [], max(0.0, min(rest, 0.2)))
        for channel in readable:
            child = channels[channel]
            try:
                data = channel.recv(1 << 16)
            except ConnectionError:  # it died with a request unread
                data = b""
            if not data:
                raise self._lost(child)
            child.received += data
            self._take_frames(child)
        for child in self._children:
            if child.channel not in readable and _ended(child, keep=True):
                raise self._lost(child)
            if time.monotonic() > child.deadline:
                raise self._late(child)

    def _take_frames(self, child: _Child) -> None:
        while len(child.received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(child.received)
            end = _LENGTH.size + length
            if len(child.received) < end:
                return
            try:
                kind, value = pickle.loads(child.received[_LENGTH.size : end])
            except Exception:
                how = "its process writes to the connection of the check"
                raise LostError(self._step(child), how, _innermost(child.stacks)) from None
            del child.received[:end]
            if kind == "failed":
                raise FailedError(value)
            if kind == "at":
                self.at = value
                continue
            if child.step is not None:
                self._done[child.step] = value
            self._give_work(child)

    def _give_work(self, child: _Child) -> None:
        if self._next == len(self.items):
            child.step, child.deadline = None, float("inf")
            self._children.remove(child)
            _kill(child)
            return
        child.step, child.deadline = self._next, time.monotonic() + self.seconds
        self._next += 1
        with suppress(OSError):  # it died; seen when its channel is read
            child.channel.sendall(_NUMBER.pack(child.step))

    def _lost(self, child: _Child) -> LostError:
        end = time.monotonic() + 1.0
        while not _ended(child, keep=True) and time.monotonic() < end:
            time.sleep(0.01)  # it has closed its channel, and is about to end
        return LostError(self._step(child), _how(child), _innermost(child.stacks))

    def _late(self, child: _Child) -> LostError:
        with suppress(OSError):
            os.kill(child.pid, signal.SIGUSR1)  # faulthandler writes where it is
        end = time.monotonic() + 1.0
        while not (at := _innermost(child.stacks)) and time.monotonic() < end:
            time.sleep(0.02)
        how = f"it takes more than {self.seconds:g} s"
        return LostError(self._step(child), how, at, late=True)

    def _step(self, child: _Child) -> object:
        return None if child.step is None else self.items[child.step]

    # --- a child --------------------------------------------------------------------------------

    def _fork(self) -> _Child:
        ours, theirs = socket.socketpair()
        stacks = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that are not there in the child
            pid = os.fork()
        if pid == 0:
            ours.close()
            self._work(theirs, stacks)
        theirs.close()
        return _Child(pid, ours, stacks, time.monotonic() + self.seconds)

    def _work(self, channel: socket.socket, stacks: IO[bytes]) -> NoReturn:
        """All that a child does; it never returns into what the parent was doing."""
        pid = os.getpid()
        try:
            _settle(stacks)
            try:
                self._guard()
                run = self.start(lambda at: _send(channel, pid, ("at", at)))
                _send(channel, pid, ("ready", None))
                while request := channel.recv(_NUMBER.size):
                    self._guard()
                    _send(channel, pid, ("result", run(self.items[_NUMBER.unpack(request)[0]])))
            except BaseException as error:
                _send(channel, pid, ("failed", self.describe(error)))
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(0)

    def _guard(self) -> None:
        """Should the parent be killed, this child ends all the same."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.seconds + 10)


def _settle(stacks: IO[bytes]) -> None:
    """Leave the terminal, stdin and stdout to the parent."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    with suppress(OSError):
        os.dup2(2, 1)
    sys.stdout = sys.stderr


def _send(channel: socket.socket, pid: int, message: tuple[str, Any]) -> None:
    if os.getpid() != pid:  # the code forked, and this is the copy
        os._exit(1)
    data = pickle.dumps(message)
    channel.sendall(_LENGTH.pack(len(data)) + data)


# --- how a child ended ----------------------------------------------------------------------------


def _ended(child: _Child, *, keep: bool) -> bool:
    """Whether the process is over; with `keep`, its status can be asked for later."""
    with suppress(ChildProcessError):
        flags = os.WEXITED | os.WNOHANG | (os.WNOWAIT if keep else 0)
        return os.waitid(os.P_PID, child.pid, flags) is not None
    return True


def _how(child: _Child) -> str:
    with suppress(ChildProcessError):
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return "its process cut its connection to the check"
        if ended.si_code == os.CLD_EXITED:
            return f"its process exits with status {ended.si_status}"
        return f"its process is ended by {signal.Signals(ended.si_status).name}"
    return "its process is gone"


def _kill(child: _Child) -> None:
    for kill in (os.killpg, os.kill):
        with suppress(OSError):
            kill(child.pid, signal.SIGKILL)
    with suppress(OSError):
        os.waitpid(child.pid, 0)
    child.channel.close()
    child.stacks.close()


def _innermost(stacks: IO[bytes]) -> str:
    """The innermost line that faulthandler saw outside of Python, torch and this package."""
    # Not seek: parent and child share the position in the file.
    text = os.pread(stacks.fileno(), 1 << 16, 0).decode(errors="replace")
    # It writes characters beyond ASCII as escapes.
    text = re.sub(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})", lambda m: chr(int(m[1] or m[2], 16)), text)
    for file, number in re.findall(r'File "(.+)", line (\d+) in', text):
        if is_users(file):
            return f"{short_path(file)}:{number}"
    return ""
