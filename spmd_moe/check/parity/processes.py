"""Ranks as gloo processes, for modules that cannot run as threads of one.

The processes are new Python interpreters: they build the target again, and are given the weights
and arguments of one process in a file. What each computes comes back in a file of its own.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, cast, final

import torch
import torch.distributed as dist

from spmd_moe.check.parity.built_target import AnyLayout, AnyTarget, Question, RefusedError, Setup
from spmd_moe.check.parity.cannot_compare import (
    RemoteError,
    innermost_line,
    innermost_of_dump,
    is_checkers,
    told,
)
from spmd_moe.check.parity.cpu_stand_ins import installed
from spmd_moe.check.parity.run_one_process import Alone, unobserved
from spmd_moe.check.parity.run_one_rank import RankRun, run_rank
from spmd_moe.check.target import CannotCheckError, cannot
from spmd_moe.check.thread_ranks import RanksError

Again: TypeAlias = Callable[[], AnyTarget]  # makes the target in another process
START = 120.0  # for importing torch, on a busy machine
GRACE = 3.0  # for the ranks that did not fail, once another has
MODULE = "spmd_moe.check.parity.processes"
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@final
@dataclass(frozen=True, slots=True)
class Work:
    """The arguments of `run_rank` that are the same on every rank."""

    path: list[str]
    again: Again
    layout: AnyLayout
    tokens: int | None
    options: tuple[tuple[str, object], ...]
    dtype: torch.dtype
    alone: Alone
    known: dict[str, set[str]]
    stand_ins: tuple[str, ...]
    seconds: float


# --- the parent ---------------------------------------------------------------------------------


def in_processes(
    question: Question,
    alone: Alone,
    known: Mapping[str, set[str]],
    again: Again,
    stand_ins: Sequence[str],
    seconds: float,
) -> list[RankRun]:
    """The result of `run_rank` on every rank, each a process.

    Raises:
        RanksError: Ranks failed, or did not come to an end.
        CannotCheckError: The target cannot be sent to other processes.
    """
    # Ranks do not need the module and the results of one process, which may not pickle.
    given = dataclasses.replace(alone, setup=cast(Setup, None), steps=[])
    layout, world = question.layout, question.layout.world
    asked = layout, question.tokens, question.options, question.dtype
    work = Work(list(sys.path), again, *asked, given, dict(known), tuple(stand_ins), seconds)
    try:
        packed = pickle.dumps(work)
        pickle.loads(pickle.dumps(again))
    except Exception as error:  # pickle raises errors of any class
        why = "the target, or an option of it, cannot be sent to another process"
        fix = "a function at the top level of a module that can be imported"
        raise cannot("TARGET", f"pickle raises {told(error)}", why, fix) from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "work").write_bytes(packed)
        command = [sys.executable, "-W", "ignore", "-m", MODULE, folder]
        ranks = [_start([*command, str(rank)]) for rank in range(world)]
        try:
            stuck = _join(ranks, Path(folder), seconds)
            where = next(filter(None, (_line(folder, rank, ranks) for rank in stuck)), "")
        finally:
            for process in ranks:
                _end(process)
        return _results(folder, ranks, stuck, where)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": _LOOPBACK}
    package = str(Path(__file__).parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if _has_file(sys.stderr) else subprocess.DEVNULL,
        stderr=None if _has_file(sys.stderr) else subprocess.DEVNULL,
        start_new_session=True,
    )


def _has_file(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (OSError, ValueError, AttributeError):  # as under pytest
        return False


def _join(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, seconds: float) -> list[int]:
    """Wait for all ranks; return those that did not end in time, counted once all have started."""
    end, started, failed = time.monotonic() + START, False, False
    while any(process.poll() is None for process in ranks) and time.monotonic() < end:
        time.sleep(0.02)
        if not started and all(Path(folder, f"started{r}").is_file() for r in range(len(ranks))):
            started, end = True, time.monotonic() + seconds
        if not failed and any(process.poll() for process in ranks):
            failed, end = True, min(end, time.monotonic() + GRACE)
    return [rank for rank, process in enumerate(ranks) if process.poll() is None]


def _line(folder: str, rank: int, ranks: Sequence[subprocess.Popen[bytes]]) -> str:
    """Where a rank waits, by faulthandler."""
    with suppress(OSError):
        os.kill(ranks[rank].pid, signal.SIGUSR1)
    stacks, end = Path(folder, f"stacks{rank}"), time.monotonic() + 1.0
    while time.monotonic() < end:
        if stacks.is_file() and (at := innermost_of_dump(stacks.read_text(errors="replace"))):
            return at
        time.sleep(0.02)
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _results(
    folder: str, ranks: Sequence[subprocess.Popen[bytes]], stuck: list[int], where: str
) -> list[RankRun]:
    errors: dict[int, BaseException] = {}
    found: list[RankRun] = []
    for rank, process in enumerate(ranks):
        file = Path(folder, f"result{rank}")
        if file.is_file():
            result = pickle.loads(file.read_bytes())
            if isinstance(result, BaseException):
                errors[rank] = result
            else:
                found.append(result)
        elif rank not in stuck:
            said = f"no error, and its process ends with status {process.returncode}"
            errors[rank] = RemoteError(said, "unknown")
    if errors or stuck:
        # A rank whose peer has failed raises in a collective; the peer's error is the cause.
        own = {r: e for r, e in errors.items() if not _lost_a_partner(e)} or errors
        raise RanksError("ranks failed in processes", own, stuck, where)
    return found


def _lost_a_partner(error: BaseException) -> bool:
    words = ("Connection closed by peer", "Connection reset", "gloo")
    return isinstance(error, RemoteError) and any(word in error.said for word in words)


# --- a rank -------------------------------------------------------------------------------------


@final
class StoreTable:
    """Values that ranks exchange, in a store of their own: process groups belong to the module."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._calls = 0

    def tell(self, key: object, value: Any) -> list[Any]:
        """The values of all ranks. Every rank calls it in the same order."""
        self._calls += 1
        self._store.set(f"{self._calls}.{self._rank}", pickle.dumps(value).hex())
        names = [f"{self._calls}.{rank}" for rank in range(self._world)]
        return [pickle.loads(bytes.fromhex(self._store.get(name).decode())) for name in names]

    @contextmanager
    def held(self) -> Iterator[None]:
        yield


def main(folder: str, rank: int) -> None:
    """Run one rank: read the work from a file of the parent, write the result to a file."""
    faulthandler.register(signal.SIGUSR1, open(Path(folder, f"stacks{rank}"), "w"))  # noqa: SIM115
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: RankRun | BaseException
    try:
        result = _run(folder, rank)
    except (CannotCheckError, RefusedError) as error:
        result = error
    except BaseException as error:
        result = RemoteError(told(error), innermost_line(error), is_checkers(error))
    whole = Path(folder, f"part{rank}")
    whole.write_bytes(pickle.dumps(result))
    whole.rename(Path(folder, f"result{rank}"))
    sys.stdout.flush()
    os._exit(1 if isinstance(result, BaseException) else 0)  # threads of gloo's may still run


def _run(folder: str, rank: int) -> RankRun:
    work: Work = pickle.loads(Path(folder, "work").read_bytes())
    sys.path[:] = [*work.path, *(entry for entry in sys.path if entry not in work.path)]
    world = work.layout.world
    target = work.again()
    question = Question(target, work.layout, work.tokens, work.options, work.dtype)
    patience = timedelta(seconds=work.seconds + 2 * START)
    store = dist.FileStore(str(Path(folder, "told")), world)
    store.set_timeout(patience)
    table = StoreTable(store, rank, world)
    groups = dist.FileStore(str(Path(folder, "groups")), world)
    with installed(work.stand_ins, getattr(target, "patches", ())):
        dist.init_process_group("gloo", store=groups, rank=rank, world_size=world, timeout=patience)
        Path(folder, f"started{rank}").touch()
        run = run_rank(question, work.alone, table, work.known, unobserved)
        table.tell("end", None)  # none leaves while another still needs it
        return run


if __name__ == "__main__":
    import_module(MODULE).main(sys.argv[1], int(sys.argv[2]))  # not the copy that is __main__
