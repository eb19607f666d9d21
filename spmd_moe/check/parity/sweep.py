"""Every configuration of a target: one process, then all ranks, compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import final

import torch
from torch import Tensor

from spmd_moe.check.parity.axis_groups import MeshSizes
from spmd_moe.check.parity.built_target import Question, RefusedError
from spmd_moe.check.parity.cannot_compare import at_target, failure, raised_on
from spmd_moe.check.parity.compare import Compared, Difference, compare
from spmd_moe.check.parity.explain import CLOSE, distance
from spmd_moe.check.parity.merge_findings import Cause, causes
from spmd_moe.check.parity.run_all_ranks import Ranks
from spmd_moe.check.parity.run_one_process import Alone, run_alone
from spmd_moe.check.parity.run_one_rank import RankRun
from spmd_moe.check.target import CannotCheckError, cannot
from spmd_moe.check.thread_ranks import RanksError
from spmd_moe.core.errors import SpmdMoeError, short_dtype

ROUNDINGS = 5  # runs of one process in a low precision, each rounded differently
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
    ranks: Ranks
    _alone: dict[Question, Alone] = field(default_factory=dict)

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
            runs = self.ranks.run(question, alone)
        except RefusedError as error:
            outcome.refused = str(error)
        except CannotCheckError as error:
            outcome.failed = at_target(str(error), question)
        except RanksError as error:
            outcome.refused, failed = failure(error)
            outcome.failed = at_target(failed, question)
        else:
            self.ranks.learn(runs[0].parts)
            found = self._compare(question, alone, runs)
            if found.differences and (instead := self.ranks.doubted(question, alone)):
                other = self._compare(question, alone, instead)
                if [d.title for d in other.differences] == [d.title for d in found.differences]:
                    self.ranks.agree()
                found, runs = other, instead
            if found.doubtful and not found.differences:
                outcome.failed = at_target(_doubtful(found), question)
                return outcome
            if alone.low and found.differences and all(map(_may_be_rounding, found.differences)):
                outcome.failed = at_target(_too_low(alone, found), question)
                return outcome
            module, world = alone.setup.module, question.layout.world
            outcome.compared = found
            outcome.causes = causes(found.differences, question, module, world)
        return outcome

    def _compare(self, question: Question, alone: Alone, runs: Sequence[RankRun]) -> Compared:
        return compare(alone, runs, runs[0].axes, self._without(question, alone, runs))

    def alone(self, question: Question) -> Alone:
        if question not in self._alone:
            found = self._run_alone(question, self.steps)
            self._check_steady(question, found)
            if question.dtype != torch.float64:
                self._round(question, found)
            self._alone[question] = found
        return self._alone[question]

    def _run_alone(
        self,
        question: Question,
        steps: int,
        weights: Mapping[str, Tensor] | None = None,
        arguments: Sequence[object] | None = None,
    ) -> Alone:
        args = (question, steps, self.ranks.observe, weights, arguments)
        try:
            if isinstance(question.layout, MeshSizes):
                return self.ranks.alone(run_alone, *args)
            return run_alone(*args)
        except RanksError as error:
            refused, failed = failure(error, "one process")
            if refused:
                raise RefusedError(refused) from error
            raise CannotCheckError(failed) from error
        except (SpmdMoeError, RefusedError):
            raise
        except Exception as error:
            raise CannotCheckError(raised_on("one process", error)) from error

    def _check_steady(self, question: Question, found: Alone) -> None:
        """Built and run again, it computes the same; disturbed a little, nearly the same."""
        disturbed: list[object] = []
        for arg in found.arguments:
            if isinstance(arg, Tensor) and arg.is_floating_point():
                arg = arg * (1 + 1e-10)
            disturbed.append(arg)
        wide = question.dtype == torch.float64
        for arguments in (disturbed, found.arguments) if wide else (found.arguments,):
            again = self._run_alone(question, 1, found.weights, arguments)
            found.low |= again.low if wide else frozenset()
            name, off = _unlike(found, again)
            if off < STEADY:
                return
            if arguments is disturbed:
                continue
            what = f"{name} is not the same when it is run again on one process: off by {off:.2g}"
            why = "what one process does not repeat cannot be compared; dropout is off already"
            raise cannot("TARGET", what, why, "turn random draws off, or seed them in the target")
        if not wide:
            return
        name, off = _unlike(found, self._run_alone(question, 1, found.weights, disturbed))
        if off < CLOSE / 10:
            return
        what = f"{name} moves by {off:.2g} when the input moves by 1e-10"
        why = "something inside is chosen between equals, or divided by what is nearly zero"
        raise cannot("TARGET", what, why, "inputs and weights without equal values")

    def _round(self, question: Question, found: Alone) -> None:
        """How much each tensor changes when inputs and weights are rounded differently."""
        random = torch.Generator().manual_seed(4)
        moved: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDINGS):
            weights = {name: _rounded(t, random) for name, t in found.weights.items()}
            args = [_rounded(a, random) if isinstance(a, Tensor) else a for a in found.arguments]
            again = self._run_alone(question, 1, weights, args)
            for key, held in found.steps[0].tensors.items():
                other = again.steps[0].tensors.get(key)
                if held is not None and other is not None:
                    moved.setdefault(key, []).append(distance(other.value, held.value))
        found.rounding = {key: (median(offs), max(offs)) for key, offs in moved.items()}

    def _without(
        self, question: Question, alone: Alone, runs: Sequence[RankRun]
    ) -> Callable[[str, int], Mapping[str, Tensor]]:
        """The lone outputs, with the weights of one place of an axis set to zero."""
        axes = runs[0].axes

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


def _rounded(t: Tensor, random: torch.Generator) -> Tensor:
    """Each value moved by up to one step of its precision."""
    if not t.is_floating_point():
        return t
    steps = torch.rand(t.shape, generator=random, dtype=torch.float64) * 2 - 1
    return (t.double() * (1 + steps * torch.finfo(t.dtype).eps)).to(t.dtype)


def _doubtful(found: Compared) -> str:
    what = f"{', '.join(found.doubtful[:4])} differ by no more than rounding sometimes changes them"
    why = "rounding changes a choice, such as an expert, and may have done so between the ranks"
    return str(cannot("TARGET", what, why, "without --dtype", "inputs without nearly equal scores"))


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
