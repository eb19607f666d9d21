"""All tensors of all ranks, compared with those of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from spmd_moe.check.parity.axis_groups import Axes, Groups
from spmd_moe.check.parity.explain import (
    CLOSE,
    Story,
    Without,
    beside_a_bias,
    distance,
    lacks,
    stories,
    tolerance,
    zeros,
)
from spmd_moe.check.parity.run_one_process import Alone, Held
from spmd_moe.check.parity.run_one_rank import RankRun

TIMES = 4.0  # of the effect of rounding inputs: ranks also add in a different order
DEAD = 1e-6  # beside the largest value of its kind: nothing but rounding
KINDS = ("output", "gradient of input", "gradient of", "buffer", "parameter after the step")


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not that of one process."""

    kind: str
    name: str
    step: int
    ranks: tuple[int, ...]  # on which it is off
    off: float
    norms: tuple[float, ...]  # beside the true norms
    what: str  # in place of numbers, where there are none
    story: Story | None = None

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"


@final
@dataclass(slots=True)
class Compared:
    """What came of one configuration."""

    tensors: int = 0
    dead: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)  # off by what rounding sometimes does
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(alone: Alone, runs: Sequence[RankRun], axes: Axes, without: Without) -> Compared:
    """Keep the differences of the first step that has any; later ones follow from them."""
    found = Compared()
    for number, step in enumerate(alone.steps):
        scales = _scales(step.tensors)
        for kind in KINDS:
            for (its_kind, name), held in step.tensors.items():
                if its_kind == kind:
                    _one(found, alone, runs, axes, without, number, (kind, name), held, scales)
        if found.differences:
            break
    return found


def _scales(tensors: Mapping[tuple[str, str], Held | None]) -> dict[str, float]:
    """The largest value of each kind of tensor."""
    found: dict[str, float] = {}
    for (kind, _), held in tensors.items():
        if held is not None and held.value.numel():
            size = float(held.value.double().abs().max())
            found[kind] = max(found.get(kind, 0.0), size)
    return found


def _one(
    found: Compared,
    alone: Alone,
    runs: Sequence[RankRun],
    axes: Axes,
    without: Without,
    number: int,
    key: tuple[str, str],
    lone: Held | None,
    scales: Mapping[str, float],
) -> None:
    kind, name = key
    everywhere = [run.steps[number].tensors for run in runs]
    here = [r for r, tensors in enumerate(everywhere) if key in tensors]
    held = [everywhere[r][key] for r in here]
    floor = DEAD * scales.get(kind, 0.0) + 1e-30
    if lone is None:
        if any(
            h is not None and h.value.abs().max() > floor
            for h in held
            if h is None or h.value.numel()
        ):
            _missing(found, kind, name, number, here, "ranks have one, and one process has none")
        return
    true_size = _size(lone.value)
    if all(h is None for h in held):
        if true_size > floor:
            _missing(found, kind, name, number, here, "no rank has one, and one process has")
        return
    some = next(h for h in held if h is not None)
    parts = [
        h.part if h is not None else runs[r].parts.get(name, some.part)
        for r, h in zip(here, held, strict=True)
    ]
    want = [p.of(lone.value) for p in parts]
    if kind == "gradient of input":
        want = [w * runs[r].scale for r, w in zip(here, want, strict=True)]
    have = [
        h.value if h is not None else torch.zeros_like(w) for h, w in zip(held, want, strict=True)
    ]
    found.tensors += 1
    if len(here) == axes.world:
        have = _summed(have, parts)
    if true_size <= floor and all(
        not h.numel() or float(h.double().abs().max()) <= floor for h in have
    ):
        found.dead.append(f"{kind} {name}")
        return
    usual, most = alone.rounding.get(key, (0.0, 0.0))
    if alone.rounding and lone.value.is_floating_point():
        usual = max(usual, torch.finfo(lone.value.dtype).eps)  # sums of exact values are rounded
    limit = max(CLOSE, TIMES * usual)
    offs = [distance(h, w, floor) for h, w in zip(have, want, strict=True)]
    bad = tuple(r for r, off in zip(here, offs, strict=True) if off > limit)
    if not bad:
        return
    story = None
    if len(here) == axes.world:
        with tolerance(limit):
            story = _story(alone, runs, axes, without, key, have, want)
    if story is None and max(offs) <= 2 * most:
        found.doubtful.append(f"{kind} {name}")
        return
    if kind == "buffer" and story is not None and story.key[0] == "sum":
        over = " and ".join(story.key[1:])
        found.notes.append(f"buffer {name} is read as a part of a sum over {over}")
        return
    norms = tuple(_ratio(h, w) for h, w in zip(have, want, strict=True) if w.any())
    what = ""
    if any(h.shape != w.shape for h, w in zip(have, want, strict=True)):
        r = here.index(bad[0])
        what = f"its shape is {list(have[r].shape)} on rank {bad[0]}, not {list(want[r].shape)}"
    found.differences.append(Difference(kind, name, number, bad, max(offs), norms, what, story))


def _missing(
    found: Compared, kind: str, name: str, step: int, here: Sequence[int], what: str
) -> None:
    found.tensors += 1
    found.differences.append(Difference(kind, name, step, tuple(here), float("inf"), (), what))


def _size(t: Tensor) -> float:
    return float(t.double().abs().max()) if t.numel() else 0.0


def _summed(have: Sequence[Tensor], parts: Sequence[object]) -> list[Tensor]:
    """What is a part of a sum or of a mean, by its placement, put together."""
    found = list(have)
    first = parts[0]
    for groups in getattr(first, "sums", ()):
        found = _along(found, groups, mean=False)
    for groups in getattr(first, "averages", ()):
        found = _along(found, groups, mean=True)
    return found


def _along(have: list[Tensor], groups: Groups, mean: bool) -> list[Tensor]:
    found = list(have)
    for group in groups:
        if len({have[r].shape for r in group}) == 1:
            stacked = torch.stack([have[r] for r in group])
            total = stacked.mean(0) if mean else stacked.sum(0)
            for r in group:
                found[r] = total
    return found


def _ratio(have: Tensor, want: Tensor) -> float:
    true = float(want.double().norm())
    return float(have.double().norm()) / true if true else float("nan")


def _story(
    alone: Alone,
    runs: Sequence[RankRun],
    axes: Axes,
    without: Without,
    key: tuple[str, str],
    have: Sequence[Tensor],
    want: Sequence[Tensor],
) -> Story | None:
    kind, name = key
    story = next(stories(have, want, axes, kind), None)
    if story is None and kind == "output":

        def part(whole: Tensor, rank: int) -> Tensor:
            held = runs[rank].steps[0].tensors[key]
            assert held is not None
            return held.part.of(whole)

        story = next(beside_a_bias(have, want, alone.weights, axes), None)
        story = story or next(lacks(name, have, part, axes, without), None)
    return story or next(zeros(have, want), None)
