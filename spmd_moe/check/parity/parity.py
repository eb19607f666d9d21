"""Entry points: `parity` for tests, `run_parity` for programs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from spmd_moe.check.layouts import layouts as all_layouts
from spmd_moe.check.parity.axis_groups import MeshSizes, default_sizes
from spmd_moe.check.parity.built_target import (
    AnyLayout,
    AnyTarget,
    Question,
    takes_tokens,
    wants_moe_mesh,
)
from spmd_moe.check.parity.cpu_stand_ins import installed
from spmd_moe.check.parity.processes import Again
from spmd_moe.check.parity.report import ParityReport
from spmd_moe.check.parity.run_all_ranks import Ranks
from spmd_moe.check.parity.run_one_process import Observe, unobserved
from spmd_moe.check.parity.sweep import Outcome, Sweep
from spmd_moe.check.target import cannot
from spmd_moe.core.errors import PlacementError

WORLD = 4  # ranks of the largest layout, unless another is asked for
SECONDS = 60.0  # that one configuration may take
TOKENS = (8, 12, 1)  # that are tried: in this order, so that the first is the usual case


def parity(target: AnyTarget, **options: Any) -> ParityReport:
    """Compare all ranks with one process, and raise what differs; for a test.

    Args:
        target: A function of a mesh, and of a number of tokens if it wants one, that returns a
            `Case`. A mesh that is annotated `MoEMesh` is one; any other is a torch DeviceMesh.
        options: Those of `run_parity`.

    Returns:
        The report, when every output and gradient is that of one process.

    Raises:
        PlacementError: Something differs; the message says what would make it right.
        CannotCheckError: There is nothing to compare, or a configuration could not be run.

    Example:
        def test_my_block():
            parity(my_target, axes=("dp", "tp"))
    """
    report = run_parity(target, **options)
    if report.status == 1:
        raise PlacementError(str(report))
    if report.status == 2:
        what = report.summary()
        text = "\n".join(report.lines())
        raise cannot("parity", what, f"what is not compared must not pass\n{text}")
    return report


def run_parity(
    target: AnyTarget,
    *,
    layouts: Iterable[AnyLayout] | None = None,
    axes: Sequence[str] = (),
    world: int = WORLD,
    tokens: Sequence[int] = (),
    vary: Mapping[str, Sequence[object]] | None = None,
    steps: int = 2,
    seconds: float = SECONDS,
    stand_ins: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    ranks: str = "auto",
    again: Again | None = None,
    observe: Observe = unobserved,
    tell: Callable[[int, int, Outcome], None] = lambda number, of, outcome: None,
) -> ParityReport:
    """Compare all ranks of each layout with one process.

    Args:
        target: As for `parity`.
        layouts: The layouts that are tried; default: all of up to `world` ranks.
        axes: The names of the axes of a DeviceMesh, outermost first; default: dp and tp.
        world: The number of ranks of the largest layout.
        tokens: Numbers of tokens, for a target that takes one.
        vary: Further arguments of the target, each with the values that are tried.
        steps: Steps of the optimizer; with two, state that drifts apart is seen.
        seconds: The time limit of one configuration.
        stand_ins: Replacements for what a CPU lacks: see `cpu_stand_ins.STAND_INS`.
        dtype: The precision. Below float64 one step runs, and a difference is an error if it
            exceeds several times the effect of rounding the inputs on one process.
        ranks: `"threads"`, gloo `"processes"`, or `"auto"`: threads, and processes if threads fail
            or share global variables that change.
        again: Creates the target in another process. Default: the target is sent by its name.
        observe: A context manager that is entered around each forward and backward.
        tell: Called after each configuration.

    Returns:
        The report.
    """
    begin = time.monotonic()
    questions = list(_questions(target, layouts, axes, world, tokens, vary or {}))
    if not questions or steps < 1:
        why = "there must be a layout of at least two ranks, and a step"
        raise cannot("parity", f"{len(questions)} configurations, {steps} steps", why, "world=4")
    wanted = ("dropout", *getattr(target, "stand_ins", ()), *stand_ins)
    if dtype != torch.float64:
        questions = [dataclasses.replace(q, dtype=dtype) for q in questions]
        steps, wanted = 1, tuple(name for name in wanted if name != "float64")
    outcomes = []
    again = again or functools.partial(_same, target)
    every = Ranks(seconds, observe, ranks, again, wanted)
    with installed(wanted, getattr(target, "patches", ())):
        for number, outcome in enumerate(Sweep(questions, steps, every).outcomes(), 1):
            outcomes.append(outcome)
            tell(number, len(questions), outcome)
    name = str(getattr(target, "__qualname__", type(target).__qualname__))
    shown = tuple(dict.fromkeys(wanted[1:]))
    notes = tuple(getattr(target, "notes", ()))
    took = time.monotonic() - begin
    report = ParityReport(name, tuple(outcomes), shown, notes, tuple(every.notes), took)
    if all(outcome.refused for outcome in outcomes):
        what = f"every layout is refused; the last: {outcomes[-1].refused}"
        why = "a check that has run nothing must not pass"
        raise cannot("TARGET", what, why, "layouts=... that it can do, or axes=... by its names")
    return report


def _same(target: AnyTarget) -> AnyTarget:
    return target


def _questions(
    target: AnyTarget,
    chosen: Iterable[AnyLayout] | None,
    axes: Sequence[str],
    world: int,
    tokens: Sequence[int],
    vary: Mapping[str, Sequence[object]],
) -> Iterable[Question]:
    names = tuple(axes) or tuple(getattr(target, "axes", ())) or ("dp", "tp")
    if chosen is None:
        ours = wants_moe_mesh(target) and not axes
        chosen = (
            (x for x in all_layouts(world) if x.world > 1) if ours else default_sizes(names, world)
        )
    counts: Sequence[int | None] = (tokens or TOKENS) if takes_tokens(target) else (None,)
    ways = [[(name, value) for value in values] for name, values in vary.items()]
    for layout in chosen:
        if isinstance(layout, MeshSizes):
            known = dict(layout.sizes)  # every layout has all axes, some of one rank
            rest = tuple((name, 1) for name in names if name not in known)
            layout = MeshSizes(rest + layout.sizes) if rest else layout
        for count in counts:
            for options in itertools.product(*ways):
                yield Question(target, layout, count, options)
