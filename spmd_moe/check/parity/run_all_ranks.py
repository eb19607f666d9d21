"""All ranks of a layout: as threads, or as gloo processes if the module cannot run on threads."""

from __future__ import annotations

import dataclasses
import dis
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import TypeVar, TypeVarTuple, final

import torch.distributed as dist
from torch import nn

from spmd_moe.check.parity.axis_groups import MeshSizes
from spmd_moe.check.parity.built_target import Question, RefusedError
from spmd_moe.check.parity.cannot_compare import failure
from spmd_moe.check.parity.held_elements import AmbiguousError, Part
from spmd_moe.check.parity.processes import Again, in_processes
from spmd_moe.check.parity.run_one_process import Alone, Observe
from spmd_moe.check.parity.run_one_rank import RankRun, read_rank, run_rank
from spmd_moe.check.parity.weights import Table
from spmd_moe.check.target import CannotCheckError, cannot
from spmd_moe.check.thread_ranks import RanksError, threaded

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
WAYS = ("auto", "threads", "processes")


@final
@dataclass(slots=True)
class Ranks:
    """Runs all ranks; `notes` has the reasons for using processes."""

    seconds: float
    observe: Observe
    way: str
    again: Again
    stand_ins: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    known: dict[str, set[str]] = field(default_factory=dict)
    _useless: bool = False  # processes were tried, and did not help
    _asked: bool = False  # whether processes agree with threads about a finding

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            why = "ranks run as threads of this process, as gloo processes, or as either"
            raise cannot("parity", f"ranks is {self.way!r}", why, *map(repr, WAYS))

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
        try:
            return self._run(question, alone)
        except RanksError as error:
            if self.way != "auto" or self._useless or not _may_be_of_threads(error):
                raise
            why = _first(failure(error)[1])
            found = self._instead(question, alone, f"as threads, {why}")
            if found is None:
                raise
            return found

    def _instead(self, question: Question, alone: Alone, why: str) -> list[RankRun] | None:
        """Run in processes, now and in later runs. None if processes fail too."""
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
        """After the first finding: the runs in processes, if threads share global variables."""
        if self.way != "auto" or self._useless or self._asked:
            return None
        self._asked = True
        shared = self._assigned(question, alone)
        if not shared:
            return None
        return self._instead(question, alone, f"threads share {', '.join(shared[:3])}.")

    def _assigned(self, question: Question, alone: Alone) -> list[str]:
        """Run the ranks again and return the global variables that functions assign."""
        codes = shared_variables(alone.setup.module)
        if not codes:
            return []
        called = set[CodeType]()

        def note(frame: FrameType, event: str, arg: object) -> None:
            if event == "call" and frame.f_code in codes:
                called.add(frame.f_code)

        before = threading.getprofile()
        threading.setprofile(note)
        try:
            self._run(question, alone)
        except (CannotCheckError, RanksError):
            pass  # what was called until then
        finally:
            threading.setprofile(before)
        return list(dict.fromkeys(name for code in called for name in codes[code]))

    def agree(self) -> None:
        """Processes and threads agree: use threads again."""
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
                    continue  # a layout that cannot run decides nothing
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


def shared_variables(module: nn.Module) -> dict[CodeType, list[str]]:
    """The functions of a module's packages that assign variables of modules, and which."""
    found: dict[CodeType, list[str]] = {}
    for loaded in _own_modules(module):
        functions = [v for v in vars(loaded).values() if _is_of(v, loaded)]
        members = [m for v in functions if isinstance(v, type) for m in vars(v).values()]
        for value in (*functions, *members):
            code = getattr(getattr(value, "__func__", value), "__code__", None)
            for inner in _codes(code) if isinstance(code, CodeType) else ():
                instructions = dis.get_instructions(inner)
                names = [i.argval for i in instructions if i.opname == "STORE_GLOBAL"]
                if names:
                    found[inner] = [f"{loaded.__name__}.{name}" for name in names]
    return found


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


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
