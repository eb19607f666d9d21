"""Every configuration of a target: one process, then all ranks, compared."""

from __future__ import annotations

import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from spmd_moe.check.parity.alone import Alone, Observe, run_alone
from spmd_moe.check.parity.axes import MeshSizes
from spmd_moe.check.parity.causes import Cause, causes
from spmd_moe.check.parity.compare import Compared, Difference, compare
from spmd_moe.check.parity.explain import CLOSE, distance
from spmd_moe.check.parity.placements import AmbiguousError, Part
from spmd_moe.check.parity.run import RankRun, read_rank, run_rank
from spmd_moe.check.parity.setup import Question, RefusedError
from spmd_moe.check.parity.weights import Table
from spmd_moe.check.target import CannotCheckError, cannot
from spmd_moe.check.thread_ranks import RanksError, threaded
from spmd_moe.core.errors import SpmdMoeError, short_dtype
from spmd_moe.core.messages import short_path

STEADY = 1e-7  # of float64: what a disturbance of 1e-10 may grow to


@final
@dataclass(slots=True)
class Outcome:
    """What came of one configuration: compared, refused, or not to be run."""

    question: Question
    compared: Compared | None = None
    causes: list[Cause] = field(default_factory=list)
    refused: str = ""
    failed: str = ""  # why there is no comparison
    seconds: float = 0.0


@final
@dataclass(slots=True)
class Sweep:
    """All configurations; what one process computes is kept for layouts that share it."""

    questions: Sequence[Question]
    steps: int
    seconds: float
    observe: Observe
    _alone: dict[Question, Alone] = field(default_factory=dict)
    _known: dict[str, set[str]] = field(default_factory=dict)

    def outcomes(self) -> Iterator[Outcome]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for question in self.questions:
                begin = time.monotonic()
                outcome = self._outcome(question)
                outcome.seconds = time.monotonic() - begin
                yield outcome

    def _outcome(self, question: Question) -> Outcome:
        outcome = Outcome(question)
        try:
            alone = self.alone(question.alone())
            runs = self._ranks(question, alone)
        except RefusedError as error:
            outcome.refused = str(error)
        except CannotCheckError as error:
            outcome.failed = _at_target(str(error), question)
        except RanksError as error:
            outcome.refused, failed = _failure(error)
            outcome.failed = _at_target(failed, question)
        else:
            self._learn(runs[0].parts)
            axes = runs[0].setup.axes
            found = compare(alone, runs, axes, self._without(question, alone, runs))
            if alone.low and found.differences and all(map(_may_be_rounding, found.differences)):
                outcome.failed = _at_target(_too_low(alone, found), question)
                return outcome
            module, world = runs[0].setup.module, question.layout.world
            outcome.compared = found
            outcome.causes = causes(found.differences, question, module, world)
        return outcome

    def _ranks(self, question: Question, alone: Alone) -> list[RankRun]:
        """All ranks; where shapes are ambiguous, layouts with one wide axis are read first."""
        world = question.layout.world
        for last in (False, True):
            args = (question, alone, Table(world), dict(self._known), self.observe)
            try:
                return threaded(world, run_rank, *args, seconds=self.seconds)
            except RanksError as error:
                ambiguous = any(isinstance(e, AmbiguousError) for e in error.errors.values())
                if last or not ambiguous or not isinstance(question.layout, MeshSizes):
                    raise
            for layout in question.layout.single_axes():
                smaller = dataclasses.replace(question, layout=layout)
                args_of = (smaller, alone, Table(layout.world), dict(self._known))
                try:
                    self._learn(
                        threaded(layout.world, read_rank, *args_of, seconds=self.seconds)[0]
                    )
                except RanksError:
                    continue  # a layout that it does not do decides nothing
        raise AssertionError

    def alone(self, question: Question) -> Alone:
        if question not in self._alone:
            found = self._run_alone(question, self.steps)
            self._check_steady(question, found)
            self._alone[question] = found
        return self._alone[question]

    def _run_alone(
        self,
        question: Question,
        steps: int,
        weights: Mapping[str, Tensor] | None = None,
        arguments: Sequence[object] | None = None,
    ) -> Alone:
        args = (question, steps, self.observe, weights, arguments)
        try:
            if isinstance(question.layout, MeshSizes):
                return threaded(1, run_alone, *args, seconds=self.seconds)[0]
            return run_alone(*args)
        except RanksError as error:
            refused, failed = _failure(error, "one process")
            if refused:
                raise RefusedError(refused) from error
            raise CannotCheckError(failed) from error
        except (SpmdMoeError, RefusedError):
            raise
        except Exception as error:
            raise CannotCheckError(_raised("one process", error)) from error

    def _check_steady(self, question: Question, found: Alone) -> None:
        """Built and run again, it computes the same; disturbed a little, nearly the same."""
        disturbed: list[object] = []
        for arg in found.arguments:
            if isinstance(arg, Tensor) and arg.is_floating_point():
                arg = arg * (1 + 1e-10)
            disturbed.append(arg)
        for arguments in (disturbed, found.arguments):
            again = self._run_alone(question, 1, found.weights, arguments)
            found.low |= again.low
            name, off = _unlike(found, again)
            if off < STEADY:
                return
            if arguments is disturbed:
                continue
            what = f"{name} is not the same when it is run again on one process: off by {off:.2g}"
            why = "what one process does not repeat cannot be compared; dropout is off already"
            raise cannot("TARGET", what, why, "turn random draws off, or seed them in the target")
        name, off = _unlike(found, self._run_alone(question, 1, found.weights, disturbed))
        if off < CLOSE / 10:
            return
        what = f"{name} moves by {off:.2g} when the input moves by 1e-10"
        why = "something inside is chosen between equals, or divided by what is nearly zero"
        raise cannot("TARGET", what, why, "inputs and weights without equal values")

    def _learn(self, parts: Mapping[str, Part]) -> None:
        """What was read from shapes without a doubt decides on larger layouts."""
        for name, part in parts.items():
            if part.read == "shape":
                self._known.setdefault(name, set()).update(cut.axis for cut in part.lies.cuts)

    def _without(
        self, question: Question, alone: Alone, runs: Sequence[RankRun]
    ) -> Callable[[str, int], Mapping[str, Tensor]]:
        """The lone outputs, with the weights of one place of an axis set to zero."""
        axes = runs[0].setup.axes

        def outputs(axis: str, place: int) -> Mapping[str, Tensor]:
            weights = {name: t.clone() for name, t in alone.weights.items()}
            changed = False
            for name, t in weights.items():
                here, there = set[int](), set[int]()
                for rank, run in enumerate(runs):
                    part = run.parts.get(name)
                    if part is None or part.index is None:
                        break
                    at = axes.coordinate(axis, rank) == place
                    (here if at else there).update(part.index.reshape(-1).tolist())
                else:
                    only = sorted(here - there)
                    t.view(-1)[only] = 0
                    changed = changed or bool(only)
            if not changed:
                return {}
            try:
                args = question.alone(), 1, weights, alone.arguments
                return self._run_alone(*args).outputs
            except CannotCheckError:
                return {}

        return outputs


def _may_be_rounding(difference: Difference) -> bool:
    return difference.story is None and difference.off < 0.1


def _too_low(alone: Alone, found: Compared) -> str:
    names = ", ".join(short_dtype(dtype) for dtype in alone.low)
    first = max(found.differences, key=lambda d: d.off)
    what = f"{first.title} is off by up to {first.off:.2g}, and the module computes in {names}"
    why = "rounding inside of it cannot be told from a mistake"
    return str(cannot("TARGET", what, why, "--stand-in float64   # casts leave float64 as it is"))


def _unlike(found: Alone, again: Alone) -> tuple[str, float]:
    """The tensor of the first step that differs most between two runs."""
    worst, most = "output", 0.0
    scales: dict[str, float] = {}
    for (kind, _), held in found.steps[0].tensors.items():
        if held is not None and held.value.numel():
            size = float(held.value.double().abs().max())
            scales[kind] = max(scales.get(kind, 1e-30), size)
    for key, held in found.steps[0].tensors.items():
        other = again.steps[0].tensors.get(key)
        if held is None or other is None:
            continue
        off = distance(other.value, held.value, 1e-3 * scales.get(key[0], 0.0) + 1e-30)
        if off > most:
            worst, most = " ".join(key), off
    return worst, most


# --- what stood in the way ----------------------------------------------------------------------


def _failure(error: RanksError, where: str = "") -> tuple[str, str]:
    """Why a layout is refused, or why it could not be run: one of them."""
    if error.stuck and not error.errors:
        at = f" at {error.where}" if error.where else ""
        what = f"ranks {error.stuck} wait for each other without end{at}"
        why = "they do not issue the same collectives in the same order"
        fix = "issue each collective on every rank, with no rows where there are none"
        return "", str(cannot("TARGET", what, why, fix))
    ranks = sorted(error.errors)
    refusals = [e for e in error.errors.values() if isinstance(e, RefusedError)]
    if refusals and len(refusals) == len(ranks):
        return str(refusals[0]), ""
    asked = next((e for e in error.errors.values() if isinstance(e, CannotCheckError)), None)
    if asked is not None:
        return "", str(asked)
    first = error.errors[ranks[0]]
    every = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return "", _raised(where or every, first)


def _at_target(text: str, question: Question) -> str:
    """With the line of the target, where no other is known."""
    target: object = question.target
    while isinstance(target, functools.partial):
        target = target.func
    code = getattr(target, "__code__", None)
    line = (
        f"{short_path(code.co_filename)}:{code.co_firstlineno}" if code is not None else "unknown"
    )
    return text.replace("  at:  unknown", f"  at:  {line}")


def _raised(where: str, error: BaseException) -> str:
    at = _users_line(traceback.extract_tb(error.__traceback__))
    said = (str(error).strip().splitlines() or [""])[0]
    what = f"on {where} it raises {type(error).__name__}: {said[:300]}"
    why, fix = (
        "what does not run cannot be compared",
        "raise ValueError   # where a layout is refused",
    )
    if isinstance(error, NotImplementedError) or "ProcessLocalGroup" in said:
        why = "torch's process group for threads may lack what it calls"
    text = str(cannot("TARGET", what, why, fix))
    return text.rpartition("\n")[0] + f"\n  at:  {at}"


def _users_line(frames: traceback.StackSummary) -> str:
    """The innermost line that is neither torch's nor the checker's."""
    ours = str(Path(__file__).parents[1])
    theirs = str(Path(torch.__file__).parent)
    mine = [f for f in frames if not f.filename.startswith((ours, theirs))]
    last = (mine or list(frames))[-1] if frames else None
    return f"{short_path(last.filename)}:{last.lineno}" if last is not None else "unknown"
