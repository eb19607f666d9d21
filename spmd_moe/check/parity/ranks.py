"""All ranks of a layout: as threads, or as gloo processes where threads stand in the way."""

from __future__ import annotations

import dataclasses
import dis
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import TypeVar, TypeVarTuple, final

import torch.distributed as dist
from torch import nn

from spmd_moe.check.parity.alone import Alone, Observe
from spmd_moe.check.parity.axes import MeshSizes
from spmd_moe.check.parity.failures import failure
from spmd_moe.check.parity.placements import AmbiguousError, Part
from spmd_moe.check.parity.processes import Again, in_processes
from spmd_moe.check.parity.run import RankRun, read_rank, run_rank
from spmd_moe.check.parity.setup import Question, RefusedError
from spmd_moe.check.parity.weights import Table
from spmd_moe.check.target import CannotCheckError, cannot
from spmd_moe.check.thread_ranks import RanksError, threaded

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
WAYS = ("auto", "threads", "processes")


@final
@dataclass(slots=True)
class Ranks:
    """Runs all ranks; `notes` has what stood in the way of threads."""

    seconds: float
    observe: Observe
    way: str
    again: Again
    stand_ins: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    known: dict[str, set[str]] = field(default_factory=dict)
    _useless: bool = False  # processes were tried, and did not help

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            why = "ranks run as threads of this process, as gloo processes, or as what is possible"
            raise cannot("parity", f"there is no way {self.way!r}", why, *map(repr, WAYS))

    def alone(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """`fn` with a process group of one rank: torch's for threads, or gloo's."""
        if self.way == "processes":
            return _in_gloo(fn, *args)
        try:
            return threaded(1, fn, *args, seconds=self.seconds)[0]
        except RanksError as error:
            if self.way == "threads" or not _may_be_of_threads(error) or dist.is_initialized():
                raise
            try:
                found = _in_gloo(fn, *args)
            except Exception:
                raise error from None
            self.notes.append(f"one process runs with gloo: {_first(failure(error)[1])}")
            return found

    def run(self, question: Question, alone: Alone) -> list[RankRun]:
        """What every rank computes.

        Raises:
            RanksError: Ranks failed, or did not come to an end.
            CannotCheckError: A question to the user, or processes cannot get the target.
        """
        if self.way == "processes":
            return self._run(question, alone)
        try:
            return self._run(question, alone)
        except RanksError as error:
            if self.way == "threads" or self._useless or not _may_be_of_threads(error):
                raise
            why = _first(failure(error)[1])
            found = self._instead(question, alone, f"as threads, {why}")
            if found is None:
                raise
            return found

    def _instead(self, question: Question, alone: Alone, why: str) -> list[RankRun] | None:
        """The same in processes, and from now on; None where they cannot do it either."""
        self.way = "processes"
        try:
            found = self._run(question, alone)
        except (CannotCheckError, RanksError) as error:
            self.way, self._useless = "auto", True
            said = failure(error)[1] if isinstance(error, RanksError) else str(error)
            self.notes.append(f"{why} In gloo processes: {_first(said)}")
            return None
        self.notes.append(f"ranks run as gloo processes: {why}")
        return found

    def doubted(self, question: Question, alone: Alone) -> list[RankRun] | None:
        """After a finding: the runs in processes, once, if threads share variables."""
        if self.way != "auto" or self._useless:
            return None
        self._useless = True  # whether they agree or not, they are not asked again
        shared = shared_variables(alone.setup.module)
        if not shared:
            return None
        return self._instead(question, alone, f"threads share {', '.join(shared[:3])}.")

    def agree(self) -> None:
        """Processes say what threads say: on with threads."""
        self.way = "auto"
        self.notes.pop()

    def _run(self, question: Question, alone: Alone) -> list[RankRun]:
        """Where shapes are ambiguous, layouts with one wide axis are read first."""
        for last in (False, True):
            try:
                return self._once(question, alone)
            except RanksError as error:
                ambiguous = any(isinstance(e, AmbiguousError) for e in error.errors.values())
                if last or not ambiguous or not isinstance(question.layout, MeshSizes):
                    raise
            for layout in question.layout.single_axes():
                smaller = dataclasses.replace(question, layout=layout)
                try:
                    self.learn(self._read(smaller, alone))
                except RanksError:
                    continue  # a layout that it does not do decides nothing
        raise AssertionError

    def _once(self, question: Question, alone: Alone) -> list[RankRun]:
        if self.way == "processes":
            options = self.known, self.again, self.stand_ins, self.seconds
            return in_processes(question, alone, *options)
        world = question.layout.world
        args = (question, alone, Table(world), dict(self.known), self.observe)
        return threaded(world, run_rank, *args, seconds=self.seconds)

    def _read(self, question: Question, alone: Alone) -> dict[str, Part]:
        if self.way == "processes":
            return self._once(question, alone)[0].parts
        world = question.layout.world
        args = (question, alone, Table(world), dict(self.known))
        return threaded(world, read_rank, *args, seconds=self.seconds)[0]

    def learn(self, parts: dict[str, Part]) -> None:
        """What was read from shapes without a doubt decides on larger layouts."""
        for name, part in parts.items():
            if part.read == "shape":
                self.known.setdefault(name, set()).update(cut.axis for cut in part.lies.cuts)


def _first(text: str) -> str:
    return text.splitlines()[0].removeprefix("TARGET: ")


def _in_gloo(fn: Callable[[*Ts], T], *args: *Ts) -> T:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return fn(*args)
    finally:
        dist.destroy_process_group()


def _may_be_of_threads(error: RanksError) -> bool:
    """Not a refusal, and no question to the user: these are the same in processes."""
    known = (CannotCheckError, RefusedError)
    return not any(isinstance(e, known) for e in error.errors.values())


# --- state that threads share -------------------------------------------------------------------


def shared_variables(module: nn.Module) -> list[str]:
    """Variables of modules that functions assign, in the code that a module is made of."""
    found = []
    for loaded in _own_modules(module):
        functions = [v for v in vars(loaded).values() if _is_of(v, loaded)]
        members = [m for v in functions if isinstance(v, type) for m in vars(v).values()]
        for value in (*functions, *members):
            code = getattr(getattr(value, "__func__", value), "__code__", None)
            if isinstance(code, CodeType):
                found += [f"{loaded.__name__}.{name}" for name in _assigned(code)]
    return list(dict.fromkeys(found))


def _own_modules(module: nn.Module) -> list[ModuleType]:
    """The modules that define a module's classes, and what these use of the same packages."""
    first = {type(part).__module__ for part in module.modules()}
    packages = {name.partition(".")[0] for name in first} - {"torch", "spmd_moe"}
    waiting, found = list(first), dict[str, ModuleType]()
    while waiting:
        name = waiting.pop()
        loaded = sys.modules.get(name)
        if name in found or loaded is None or name.partition(".")[0] not in packages:
            continue
        found[name] = loaded
        for value in vars(loaded).values():
            other = value.__name__ if isinstance(value, ModuleType) else _home(value)
            waiting.append(other)
    return list(found.values())


def _home(value: object) -> str:
    name = getattr(value, "__module__", "") if isinstance(value, type | FunctionType) else ""
    return name if isinstance(name, str) else ""


def _is_of(value: object, loaded: ModuleType) -> bool:
    return _home(value) == loaded.__name__


def _assigned(code: CodeType) -> list[str]:
    """Global variables that a function assigns, with the functions in it."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"]
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return names + [name for c in inner for name in _assigned(c)]
