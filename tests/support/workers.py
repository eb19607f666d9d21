"""Real gloo workers for tests: started once, handed functions, joined within a time limit.

    def sum_of_ranks(start: int) -> float:          # at module level: it is sent by its name
        x = torch.tensor(float(start + dist.get_rank()))
        dist.all_reduce(x)
        return x.item()

    def test_sum_of_ranks() -> None:
        assert run(4, sum_of_ranks, 10) == [46.0] * 4

Every call finds a default process group of its own, so no test sees the groups of another.
Arguments and results travel by pickle: plain data and CPU tensors.

What goes wrong is reported rank by rank: `WorkersError` says who raised, who died, and for those
who neither returned nor raised, the line at which they wait. Then all workers are killed and the
next call starts new ones, which is cheap: they are forked from a process that has imported torch.

Measured on two cores: first use 3 s, new workers 0.1 s, one call 0.03 s (2 ranks) to 0.1 s (8).
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal, TypeVar, TypeVarTuple, cast, final

import torch
import torch.distributed as dist

from tests.support.simulated_ranks import leave_world

MAX_WORLD = 8
TIMEOUT = 60.0
START_TIMEOUT = 120.0  # importing torch on a busy machine
GRACE = 2.0  # how long the others may still answer once one rank has failed

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Filter = tuple[str, str, type[Warning] | tuple[type[Warning], ...], str, int]


class WorkersError(Exception):
    """At least one rank did not return; the message says what each of those did."""


@dataclass(frozen=True)
class Call:
    """What a worker is told: everything but the function and its arguments."""

    rank: int
    world: int
    timeout: float
    store: str
    filters: list[Filter]


@dataclass(frozen=True)
class Outcome:
    """What became of one rank."""

    kind: Literal["returned", "raised", "died", "hangs"]
    value: object = None  # the result, the error in one line, the exit code
    where: str = ""  # traceback or stack


# ---- the worker's side ------------------------------------------------------------------------


def _serve(pipe: Connection, log: str, stack: str) -> None:
    """Answer calls until the parent hangs up."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  (open as long as we live)
    os.dup2(sys.stdout.fileno(), 1)  # what C++ prints, too
    os.dup2(sys.stdout.fileno(), 2)
    stack_file = open(stack, "a")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stack_file, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then kills us
    torch.set_num_threads(1)
    # The machine's own name need not resolve, and loopback is all we need.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    gc.freeze()  # what is imported by now is never garbage, and need not be looked through
    pipe.send_bytes(pickle.dumps(Outcome("returned", "started")))
    while True:
        try:
            call: Call = pickle.loads(pipe.recv_bytes())
            body = pipe.recv_bytes()
        except EOFError:
            return
        try:
            reply = pickle.dumps(Outcome("returned", _answer(call, body)))
        except BaseException as error:  # pytest.fail and sys.exit are not Exceptions
            brief = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
            reply = pickle.dumps(Outcome("raised", brief, traceback.format_exc()))
        pipe.send_bytes(reply)


def _answer(call: Call, body: bytes) -> object:
    leave_world()  # here and not after the last call: by now every rank is done with that world
    # FSDP's modules are cycles, and with them live groups: each has threads that poll, and hundreds
    # of them took half of the machine.
    gc.collect()
    store = dist.FileStore(call.store, call.world)
    # Longer than the parent waits: it sees all ranks at once and tells more than gloo's message.
    patience = timedelta(seconds=call.timeout + 10 * GRACE)
    dist.init_process_group(
        "gloo", store=store, rank=call.rank, world_size=call.world, timeout=patience
    )
    torch.manual_seed(0)  # random numbers do not depend on what ran before
    fn, args = pickle.loads(body)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, message, category, module, line in reversed(call.filters):
            warnings.filterwarnings(action, message, category, module, line)  # type: ignore[arg-type]  # action is a Literal
        return fn(*args)


# ---- the parent's side ------------------------------------------------------------------------


@final
class Worker:
    """One process, the pipe to it, and the files that it writes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.log = folder / f"worker{number}.log"
        self.stack = folder / f"worker{number}.stack"
        context = multiprocessing.get_context("forkserver")
        # What FSDP loads when it first runs takes each worker seconds; here it is loaded once.
        context.set_forkserver_preload(
            [
                *("torch.distributed.fsdp", "torch._dynamo", "pytest", "spmd_moe.check.signatures"),
                *("spmd_moe.train.parallelize", "spmd_moe.train.checkpoint.save_load"),
                *("transformers.models.auto.modeling_auto", "transformers.modeling_utils"),
            ]
        )
        self.pipe, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(
            target=_serve, args=(theirs, str(self.log), str(self.stack)), daemon=True
        )
        self.process.start()
        theirs.close()  # or its death would not end the pipe

    def wait_for_start(self) -> None:
        if not self.pipe.poll(START_TIMEOUT):
            raise WorkersError(f"a worker did not start within {START_TIMEOUT:g} s")
        outcome = self.hear()
        if outcome.kind == "died":
            raise WorkersError(f"a worker died as it started, with exit code {outcome.value}")

    def say(self, call: Call, body: bytes) -> None:
        self.log.write_bytes(b"")
        with contextlib.suppress(BrokenPipeError):  # it is dead: hear() says so
            self.pipe.send_bytes(pickle.dumps(call))
            self.pipe.send_bytes(body)

    def hear(self) -> Outcome:
        try:
            outcome: Outcome = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(GRACE)
            return Outcome("died", self.process.exitcode)
        return outcome

    def stack_now(self) -> Outcome:
        """Ask a silent process for its stack; works inside C++ too, unlike a Python handler."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it died this very moment
            os.kill(self.process.pid, signal.SIGUSR1)
        text, deadline = "", time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, text = text, self.stack.read_text()
            if text and text == before:
                break
        ours = f'  File "{__file__}"'  # from there on down it is the harness
        return Outcome("hangs", where=text.split(ours)[0] or "it does not react to signals\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


@final
class Pool:
    """Workers 0 to n-1 of those started so far are the ranks of a world of n."""

    def __init__(self) -> None:
        self.started = 0  # processes, ever
        self._calls = 0
        self._workers: list[Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self, world: int, fn: Callable[..., T], args: tuple[object, ...], timeout: float
    ) -> list[T]:
        __tracebackhide__ = True
        if not 1 <= world <= MAX_WORLD:
            raise ValueError(f"run: world is {world}; it must be 1 to {MAX_WORLD}")
        body = pickle.dumps((fn, args))  # a function goes by its name: a local one is refused here
        try:
            workers = self._first(world)
            self._tell(workers, body, timeout)
            outcomes = self._listen(workers, timeout)
            if all(outcome.kind == "returned" for outcome in outcomes.values()):
                return [cast(T, outcomes[rank].value) for rank in range(world)]
            name = f"{fn.__module__}.{fn.__qualname__}"
            report = _report(name, world, timeout, outcomes, [w.log for w in workers])
        except BaseException:  # Ctrl-C, say: an answer that comes later must not meet the next call
            self.close()
            raise
        self.close()
        raise WorkersError(report)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _first(self, world: int) -> list[Worker]:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="spmd_moe_")
        fresh = range(len(self._workers), world)
        self._workers += [Worker(Path(self._folder.name), number) for number in fresh]
        self.started += len(fresh)
        for number in fresh:
            self._workers[number].wait_for_start()
        return self._workers[:world]

    def _tell(self, workers: list[Worker], body: bytes, timeout: float) -> None:
        assert self._folder is not None
        self._calls += 1
        store = f"{self._folder.name}/store{self._calls}"
        for rank, worker in enumerate(workers):
            worker.say(Call(rank, len(workers), timeout, store, _filters()), body)

    def _listen(self, workers: list[Worker], timeout: float) -> dict[int, Outcome]:
        """One outcome per rank, in the order in which they came."""
        outcomes: dict[int, Outcome] = {}
        silent = {worker.pipe: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        while silent and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(silent), left):
                assert isinstance(pipe, Connection)
                rank = silent.pop(pipe)
                outcomes[rank] = workers[rank].hear()
                if outcomes[rank].kind != "returned":  # the rest may wait for this one without end
                    deadline = min(deadline, time.monotonic() + GRACE)
        return outcomes | {rank: workers[rank].stack_now() for rank in silent.values()}


def _filters() -> list[Filter]:
    """The warning filters of the running test, so that a warning is an error in workers too."""

    def text(pattern: str | re.Pattern[str] | None) -> str:
        return pattern.pattern if isinstance(pattern, re.Pattern) else pattern or ""

    return [(a, text(msg), cat, text(mod), line) for a, msg, cat, mod, line in warnings.filters]


def _report(
    name: str, world: int, timeout: float, outcomes: dict[int, Outcome], logs: list[Path]
) -> str:
    """Who failed and how, first in one line each, then at length."""
    brief, long = [], []
    for rank, outcome in outcomes.items():
        if outcome.kind == "raised":
            brief.append(f"rank {rank} raised {outcome.value}")
            long.append(f"---- rank {rank} raised ----\n{outcome.where}")
        elif outcome.kind == "died":
            brief.append(f"rank {rank} died with exit code {outcome.value}")
        elif outcome.kind == "hangs":
            brief.append(f"rank {rank} did not answer")
            long.append(f"---- rank {rank} did not answer; it was at ----\n{outcome.where}")
    for rank, log in enumerate(logs):
        if printed := log.read_text(errors="replace"):
            long.append(f"---- rank {rank} printed ----\n{printed}")
    head = f"{name} on {world} ranks (timeout {timeout:g} s):\n  " + "\n  ".join(brief)
    return "\n".join([head, *long])


POOL = Pool()


def run(world: int, fn: Callable[[*Ts], T], *args: *Ts, timeout: float = TIMEOUT) -> list[T]:
    """Call `fn(*args)` on ranks 0 to world-1 and return the results in that order."""
    __tracebackhide__ = True
    return POOL.run(world, fn, args, timeout)
