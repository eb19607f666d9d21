"""A whole check: all layouts, in this process or in several, with a report at the end."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from spmd_moe.check.layouts import Layout, layouts
from spmd_moe.check.reports import Report
from spmd_moe.check.signatures import signatures
from spmd_moe.check.sweep import Result, check_layout
from spmd_moe.check.target import CannotCheckError, Target, build, cannot
from spmd_moe.core.errors import PlacementError
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.signatures.annotated_functions import packages_of

Tell = Callable[[int, int, Result], None]
WORLD = 8  # ranks of the largest layout, unless another is asked for
SECONDS = 60.0  # that one layout may take


def check(target: Target, **options: Any) -> Report:
    """`examine`, which raises what it finds: for a test."""
    report = run_checks(target, **options)
    if not report.ok:
        raise PlacementError(str(report))
    return report


def run_checks(
    target: Target,
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
    """Trace the target on all layouts of up to `world` ranks, or on those that are `chosen`.

    `tokens` replaces the numbers of tokens that are tried, `packages` adds to the code that is
    looked at: the packages of the module's classes. With `values`, all ranks also run with real
    numbers, and compared with one process. `seconds` is the most that a layout may take.
    With several `jobs` the process is forked; leave that to programs that have not computed yet.
    """
    begin = time.monotonic()
    everything = list(chosen if chosen is not None else layouts(_sensible(world, tokens)))
    looked_at = _packages(target, everything) | set(packages)
    results = list[Result]()
    work = _Work(target, tuple(tokens), looked_at, seconds, values)
    with closing(_each(work, everything, jobs)) as found:
        for number, result in enumerate(found, 1):
            results.append(result)
            tell(number, len(everything), result)
    name = getattr(target, "__qualname__", type(target).__qualname__)
    report = Report(name, tuple(results), time.monotonic() - begin)
    if not any(result.traced for result in results):
        why = "a check that has run nothing must not pass"
        what = f"every layout is refused; the last: {results[-1].refused.splitlines()[0]}"
        raise cannot(
            "TARGET", what, why, "choose layouts that it can do: --layout 'dp 2 tp 2 ep 2'"
        )
    return report


def _sensible(world: int, tokens: Sequence[int]) -> int:
    if world < 1 or any(n < 0 for n in tokens):
        what = f"a world of {world} and {list(tokens)} tokens cannot be"
        raise cannot(
            "check", what, "there must be a rank, and no fewer tokens than none", "world=8"
        )
    return world


def _packages(target: Target, everything: Sequence[Layout]) -> set[str]:
    """Those whose code is looked at: of the module's classes, and of the target itself."""
    if not everything:
        raise cannot("check", "there is no layout to check", "it needs at least one", "world=8")
    module = getattr(target, "__module__", None) or type(target).__module__
    own = {module.partition(".")[0]} - {"builtins"}
    try:
        with torch.random.fork_rng(devices=[]):  # the program's own numbers go on as they would
            return own | packages_of(build(target, MoEMesh.single(), 3).module)
    except CannotCheckError:
        raise
    except (ValueError, PlacementError):
        # It does not do one process alone, or in no layout; what it is made of must be enough.
        return own | {"spmd_moe"}


class _Work:
    """What is done for one layout; made once, before processes are forked."""

    def __init__(
        self,
        target: Target,
        tokens: tuple[int, ...],
        packages: set[str],
        seconds: float,
        values: bool,
    ) -> None:
        self.target, self.tokens, self.packages = target, tokens, packages
        self.seconds, self.value_seconds = seconds, seconds / 4 if values else 0.0

    def __call__(self, layout: Layout) -> Result:
        with _limit(self.seconds, layout):
            return check_layout(self.target, layout, self.packages, self.tokens, self.value_seconds)


_WORK: list[_Work] = []  # in a forked process, what it is there for


def _each(work: _Work, everything: Sequence[Layout], jobs: int) -> Generator[Result, None, None]:
    if jobs < 2 or len(everything) < 2 * jobs:
        with signatures(work.packages):
            yield from map(work, everything)
        return
    _WORK.append(work)
    try:
        with multiprocessing.get_context("fork").Pool(jobs, _enter) as pool:
            yield from pool.imap(_one, everything, chunksize=4)
    finally:
        _WORK.pop()


_ENTERED = ExitStack()


def _enter() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process' to handle
    _ENTERED.enter_context(signatures(_WORK[-1].packages))


def _one(layout: Layout) -> Result:
    return _WORK[-1](layout)


class _LateError(BaseException):
    """No Exception: the code that is checked, or what shows its errors, must not take it as one."""


@contextmanager
def _limit(seconds: float, layout: Layout) -> Iterator[None]:
    """Ends what takes too long, where signals can: in the main thread."""

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
        what = f"{layout} takes more than {seconds:g} s"
        why = "it hangs, or it is too large to trace"
        raise cannot("TARGET", what, why, "fewer tokens, narrower") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
