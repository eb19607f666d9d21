"""A whole check: all layouts, in this process or in supervised ones, with a report at the end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

import torch

from spmd_moe.check.check_layout import Result, check_layout
from spmd_moe.check.layouts import Layout, layouts
from spmd_moe.check.load_target import load
from spmd_moe.check.reports import Report, first_line
from spmd_moe.check.signatures import signatures
from spmd_moe.check.supervise import FailedError, LostError, Supervisor
from spmd_moe.check.target import CannotCheckError, Target, accounted, build, cannot, line_of
from spmd_moe.core.errors import PlacementError, SpmdMoeError
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.spmd_types_compat import require_rules
from spmd_moe.signatures.annotated_functions import packages_of

R = TypeVar("R")
Tell = Callable[[int, int, Result], None]
WORLD = 8  # ranks of the largest layout, unless another is asked for
SECONDS = 60.0  # that one layout may take, and the start


def check(target: Target | str, **options: Any) -> Report:
    """`run_checks`, which raises what it finds: for a test."""
    report = run_checks(target, **options)
    if not report.ok:
        raise PlacementError(str(report))
    return report


def run_checks(
    target: Target | str,
    *,
    world: int = WORLD,
    chosen: Iterable[Layout] | None = None,
    tokens: Sequence[int] = (),
    packages: Iterable[str] = (),
    values: bool = False,
    jobs: int = 1,
    seconds: float = SECONDS,
    tell: Tell = lambda number, of, result: None,
) -> Report:
    """Trace a target on all layouts of up to `world` ranks, or on those that are `chosen`.

    Args:
        target: The target, or its name, `package.module:callable` or `file.py:callable`. A name is
            loaded in child processes, which are killed when they are late: that check always ends.
        world: Ranks of the largest layout.
        chosen: The layouts, in place of all.
        tokens: The numbers of tokens, in place of those that are tried.
        packages: Packages whose code is checked, beside those of the module's classes.
        values: Also run all ranks with real numbers, and compare them with one process.
        jobs: Processes. With several the program is forked: it must not have run a backward.
        seconds: The time limit for one layout, and for the start.
        tell: Called after each layout with its number, the number of all, and its result.

    Raises:
        CannotCheckError: The target is none, does not finish, or refuses every layout.
        CheckerError: The checker itself failed.
    """
    require_rules("check")
    begin = time.monotonic()
    everything = list(chosen if chosen is not None else layouts(_sensible(world, tokens)))
    if not everything:
        raise cannot("check", "there is no layout to check", "it needs at least one", "world=8")
    at = _place(target)
    work = _Work(target, tuple(tokens), set(packages), seconds, values, at)
    results = list[Result]()
    with closing(_each(work, everything, jobs)) as found:
        for number, result in enumerate(found, 1):
            results.append(result)
            tell(number, len(everything), result)
    report = Report(_name(target), tuple(results), time.monotonic() - begin)
    if not any(result.traced for result in results):
        why = "a check that has run nothing must not pass"
        what = f"every layout is refused; the last: {first_line(results[-1].refused)}"
        fix = "choose layouts that it can do: --layout 'dp 2 tp 2 ep 2'"
        raise cannot("TARGET", what, why, fix, at=work.at)
    return report


def _name(target: Target | str) -> str:
    if isinstance(target, str):
        return target
    return getattr(target, "__qualname__", type(target).__qualname__)


def _place(target: Target | str) -> str:
    """Where a target is defined, as far as it is known before it is loaded."""
    return target.rpartition(":")[0] if isinstance(target, str) else line_of(target)


def _sensible(world: int, tokens: Sequence[int]) -> int:
    if world < 1 or any(n < 0 for n in tokens):
        what = f"a world of {world} and {list(tokens)} tokens cannot be"
        why = "a world has at least one rank, and numbers of tokens are not negative"
        raise cannot("check", what, why, "world=8, tokens=(0, 1, 8)")
    return world


def _packages(target: Target) -> set[str]:
    """Packages whose code is checked: of the module's classes, and of the target itself."""
    module = getattr(target, "__module__", None) or type(target).__module__
    own = {module.partition(".")[0]} - {"builtins"}
    try:
        with torch.random.fork_rng(devices=[]):  # the program's own numbers go on as they would
            return own | packages_of(build(target, MoEMesh.single(), 3).module)
    except CannotCheckError:
        raise
    except (ValueError, PlacementError):
        # It refuses one process, or every layout; what it is made of must be enough.
        return own | {"spmd_moe"}


@final
@dataclass
class _Work:
    """What is done for one layout; `begin` comes first, in the process that does it."""

    target: Target | str
    tokens: tuple[int, ...]
    packages: set[str]
    seconds: float
    values: bool
    at: str  # where the target is defined
    stack: ExitStack = field(default_factory=ExitStack)

    def begin(self, tell: Callable[[str], None] = lambda at: None) -> None:
        """Load the target and find out which code is checked. `stack` undoes what it changes."""
        if isinstance(self.target, str):
            self.target = load(self.target)
        self.at = line_of(self.target)
        tell(self.at)
        self.packages |= _packages(self.target)
        self.stack.enter_context(signatures(self.packages))

    def start(self, tell: Callable[[str], None]) -> Callable[[Layout], Result]:
        """The same, in a process of its own."""
        torch.set_num_threads(1)  # tensors are small, and there are other processes
        self.begin(tell)
        return self.check

    def check(self, layout: Layout) -> Result:
        assert not isinstance(self.target, str)
        value_seconds = self.seconds / 4 if self.values else 0.0
        return check_layout(self.target, layout, self.packages, self.tokens, value_seconds)

    def describe(self, error: BaseException) -> str:
        return str(accounted(error, self.at))


def _each(work: _Work, everything: Sequence[Layout], jobs: int) -> Generator[Result, None, None]:
    apart = isinstance(work.target, str)
    jobs = min(jobs, len(everything) // 2)  # a start takes about as long as a layout
    if apart or jobs > 1:
        yield from _supervised(work, everything, jobs)
        return
    try:
        with work.stack:
            with _limit(work.seconds, "its first build", work):
                work.begin()
            for layout in everything:
                with _limit(work.seconds, layout, work):
                    result = work.check(layout)
                yield result
    except (SpmdMoeError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise accounted(error, work.at) from error


def _supervised(
    work: _Work, everything: Sequence[Layout], jobs: int
) -> Generator[Result, None, None]:
    supervisor = Supervisor(
        work.start, everything, jobs=jobs, seconds=work.seconds, describe=work.describe
    )
    try:
        with closing(supervisor.results()) as results:
            for result in results:
                work.at = supervisor.at or work.at
                yield result
    except FailedError as error:
        raise CannotCheckError(str(error)) from None
    except LostError as error:
        raise lost(error, supervisor.at or work.at) from None


def run_apart(name: str, run: Callable[[Target], R], seconds: float) -> R:
    """`run(target)` in a process of its own, for other subcommands: it always ends.

    Args:
        name: The name of a target.
        run: What is done with it; its result must be picklable.
        seconds: The time limit of the start, and of `run`.

    Raises:
        CannotCheckError: The target cannot be loaded, dies, is late, or raises an error.
    """
    at = [_place(name)]

    def start(tell: Callable[[str], None]) -> Callable[[None], R]:
        torch.set_num_threads(1)
        target = load(name)
        at[0] = line_of(target)
        tell(at[0])
        return lambda _: run(target)

    def describe(error: BaseException) -> str:
        return str(accounted(error, at[0]))

    supervisor = Supervisor(start, [None], jobs=1, seconds=seconds, describe=describe)
    try:
        with closing(supervisor.results()) as results:
            return next(results)
    except FailedError as error:
        raise CannotCheckError(str(error)) from None
    except LostError as error:
        raise lost(error, supervisor.at or at[0]) from None


def lost(error: LostError, at: str) -> CannotCheckError:
    """What to say of a process that did not finish."""
    when = "while it starts" if error.step is None else f"while checking {error.step}"
    if error.late:
        why, fix = "it hangs, or it is too large to trace", "fewer tokens, narrower, or --seconds"
    else:
        why = "a process that ends in the middle of a check has checked nothing"
        fix = "fewer --jobs, if the system ran out of memory"
    return cannot("TARGET", f"{error.how} {when}", why, fix, at=error.at or at)


class _LateError(BaseException):
    """No Exception: the code that is checked, or what shows its errors, must not take it as one."""


@contextmanager
def _limit(seconds: float, step: object, work: _Work) -> Iterator[None]:
    """Ends what takes too long in this process, where signals can: in the main thread."""

    def late(number: int, frame: object) -> None:
        raise _LateError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _LateError:
        error = LostError(step, f"it takes more than {seconds:g} s", "", late=True)
        raise lost(error, work.at) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
