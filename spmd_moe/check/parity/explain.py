"""What would make a tensor right: hypotheses, each tried on the numbers of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias, final

import torch
from torch import Tensor

from spmd_moe.check.parity.axis_groups import Axes

CLOSE = 1e-5  # largest difference beside largest value, in float64 with parts in float32
EXACT = 1e-4  # of a factor
_close = ContextVar("close", default=CLOSE)
Tensors: TypeAlias = Sequence[Tensor]
# Runs the lone module without the weights that ranks at one place of an axis hold.
Without: TypeAlias = Callable[[str, int], Mapping[str, Tensor]]


@final
@dataclass(frozen=True, slots=True)
class Story:
    """What makes it right; `key` is alike for tensors that are wrong in the same way."""

    key: tuple[str, ...]
    text: str
    fixes: tuple[str, ...] = ()


@contextmanager
def tolerance(off: float) -> Iterator[None]:
    """A block in which tensors up to this distance apart count as equal."""
    token = _close.set(off)
    try:
        yield
    finally:
        _close.reset(token)


def close() -> float:
    return _close.get()


def exact() -> float:
    return max(EXACT, close())


def distance(have: Tensor, want: Tensor, floor: float = 1e-12) -> float:
    """The largest difference beside the largest value due; infinite where shapes differ."""
    if have.shape != want.shape:
        return float("inf")
    if not have.numel():
        return 0.0
    a, b = have.double(), want.double()
    off = float((a - b).abs().max() / b.abs().max().clamp(min=floor))
    return float("inf") if off != off else off


def right(have: Tensors, want: Tensors, floor: float = 1e-12) -> bool:
    return all(distance(h, w, floor) < close() for h, w in zip(have, want, strict=True))


def stories(have: Tensors, want: Tensors, axes: Axes, kind: str) -> Iterator[Story]:
    """Every hypothesis that holds on all ranks, the simplest first."""
    have, want = [t.double() for t in have], [t.double() for t in want]
    if all(h.shape == w.shape for h, w in zip(have, want, strict=True)):
        yield from _factor(have, want, axes, kind)
        yield from _summed(have, want, axes, kind)
        yield from _other_rank(have, want, axes)
        yield from _permuted(have, want)
        if kind in ("buffer", "parameter after the step"):
            yield from _drifted(have, want, axes)
    else:
        yield from _gathered(have, want, axes)


# --- factors and sums ---------------------------------------------------------------------------


def factor(have: Tensor, want: Tensor) -> float | None:
    """c where have = c * want."""
    a, b = have.reshape(-1), want.reshape(-1)
    square = float(b @ b)
    if square == 0:
        return None if a.any() else 1.0
    c = float(a @ b) / square
    fits = float((a - c * b).abs().max()) < exact() * abs(c) * float(b.abs().max())
    return c if fits and abs(c) > 1e-9 else None


def common_factor(have: Tensors, want: Tensors) -> float | None:
    """The factor of all ranks, where there is one."""
    found = [factor(h, w) for h, w in zip(have, want, strict=True) if w.any() or h.any()]
    if not found or any(c is None for c in found):
        return None
    first = found[0]
    assert first is not None
    alike = all(c is not None and abs(c - first) <= exact() * abs(first) for c in found)
    return first if alike else None


def _factor(have: Tensors, want: Tensors, axes: Axes, kind: str) -> Iterator[Story]:
    c = common_factor(have, want)
    if c is None or abs(c - 1) < exact():
        return
    names = _of_size(c, axes)
    because = f", the size of {names}" if names else ""
    if c > 1 and names:
        fixes = [f"divide it by {c:g}, or leave out one of two sums over {names}"]
    elif names and kind == "gradient of":
        over = names.split(" or ")[0]
        fixes = [f'trainer="average {over}"   # of the target, if the loss is a mean on each rank']
        fixes += [f"leave out the division by {1 / c:g}"]
    else:
        fixes = [f"multiply by {_ratio(1 / c)}"]
    size = f"{_ratio(c)} times what is right{because if c > 1 else ''}"
    if 0 < c < 1 and names:
        size = f"{_ratio(c)} of what is right, one part in the size of {names}"
    key = ("factor", "size" if c > 1 else "share") if names else ("factor", f"{c:.4g}")
    yield Story(key, f"it is {size}", tuple(fixes))


def _of_size(c: float, axes: Axes) -> str:
    """The axes whose size, or the product of whose sizes, is the factor or one by it."""
    size = max(abs(c), 1 / abs(c))
    found = []
    for names in axes.subsets():
        if abs(len(axes.joined(names, 0)) - size) < max(1e-3, exact() * size):
            found.append(" x ".join(names))
    return " or ".join(found) if c > 0 else ""


def _ratio(c: float) -> str:
    fraction = Fraction(c).limit_denominator(64)
    near = abs(float(fraction) - c) < exact() * max(1e-9, abs(c))
    return str(fraction) if near and fraction else f"{c:.4g}"


def _summed(have: Tensors, want: Tensors, axes: Axes, kind: str) -> Iterator[Story]:
    for names in axes.subsets():
        sums = _sums(have, axes, names)
        if sums is None:
            continue
        over = " and ".join(names)
        if right(sums, want):
            fixes = [f"sum it over {over}: an all-reduce on its way, forward or backward"]
            fixes += _declared_sum(names, kind)
            yield Story(("sum", *names), f"summed over {over} it is right", tuple(fixes))
            continue
        c = common_factor(sums, want)
        if c is not None and not _alike(have, axes, names):
            told = f"summed over {over} it is {_ratio(c)} times what is right"
            fixes = [f"sum it over {over}, and multiply by {_ratio(1 / c)}"]
            if abs(c - len(axes.joined(names, 0))) < max(1e-3, exact() * c):
                told = f"averaged over {over} it is right"
                fixes = [f"average it over {over}"]
            yield Story(("sum by factor", *names, _ratio(c)), told, tuple(fixes))


def _declared_sum(names: Sequence[str], kind: str) -> list[str]:
    """What to write into the target where other code takes the sum."""
    if kind == "gradient of":
        return [f'trainer="sum {" ".join(names)}"   # of the target, if the trainer takes it']
    words = ", ".join(f"{name} {'R' if kind == 'gradient of input' else 'P'}" for name in names)
    if kind == "gradient of input":
        return [f'"{words}" in Case   # if code outside the module takes this sum']
    return [f'out="{words}"   # of the target, if it is meant to be a part of a sum'] * (
        kind == "output"
    )


def _sums(have: Tensors, axes: Axes, names: Sequence[str]) -> list[Tensor] | None:
    groups = [axes.joined(names, rank) for rank in range(axes.world)]
    if any(have[q].shape != have[group[0]].shape for group in groups for q in group):
        return None
    return [torch.stack([have[q] for q in group]).sum(0) for group in groups]


def _alike(have: Tensors, axes: Axes, names: Sequence[str]) -> bool:
    """All ranks along the axes hold the same: a sum is then a factor."""
    return all(
        distance(have[q], have[rank]) < close()
        for rank in range(axes.world)
        for q in axes.joined(names, rank)
    )


# --- another rank's, in another order, in part --------------------------------------------------


def _other_rank(have: Tensors, want: Tensors, axes: Axes) -> Iterator[Story]:
    """Each rank holds what is another's."""
    differ = [r for r in range(axes.world) if distance(have[r], want[r]) > close()]
    taken = {}
    for rank in differ:
        near = (q for q in range(axes.world) if distance(have[rank], want[q]) < close())
        taken[rank] = next(near, None)
    if not taken or None in taken.values() or not all(have[r].any() for r in differ):
        return
    said = ", ".join(f"rank {r} has that of rank {q}" for r, q in list(taken.items())[:4])
    names = [n for n in axes.wide() if all(q in axes.group(n, r) for r, q in taken.items())]
    along = f" along {names[0]}" if names else ""
    fix = f"cut or send by this rank's place on {names[0]}" if names else "cut by this rank's place"
    yield Story(("other rank", *names[:1]), f"ranks have parts of others{along}: {said}", (fix,))


def _permuted(have: Tensors, want: Tensors) -> Iterator[Story]:
    """The same rows in another order, along one dim."""
    for dim in range(max(t.ndim for t in want)):
        if all(_same_rows(h, w, dim) for h, w in zip(have, want, strict=True)):
            what = "rows" if dim == 0 else f"entries of dim {dim}"
            text = f"right except for the order of its {what} (dim {dim})"
            fix = f"undo the permutation along dim {dim}: argsort of the order, or its inverse"
            yield Story(("permuted", str(dim)), text, (fix,))
            return
    if all(w.ndim == 2 and w.shape[1] > 2 for w in want):
        straight = [_directions(h) for h in have], [_directions(w) for w in want]
        if all(_same_rows(h, w, 0) for h, w in zip(*straight, strict=True)):
            text = "its rows are those of other rows times a factor: permuted, and then weighted"
            fix = "undo the permutation before the weights: argsort of the order, or its inverse"
            yield Story(("permuted", "weighted"), text, (fix,))


def _directions(x: Tensor) -> Tensor:
    """Rows of length 1, whose largest entry is positive."""
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)
    largest = x.abs().argmax(1, keepdim=True)
    return x * x.gather(1, largest).sign()


def _drifted(have: Tensors, want: Tensors, axes: Axes) -> Iterator[Story]:
    """What is due on all ranks of an axis alike differs between them."""
    for name in axes.wide():
        pairs = [(rank, q) for group in axes.groups[name] for rank in group for q in group]
        due = all(torch.equal(want[a], want[b]) for a, b in pairs)
        if due and not all(distance(have[a], have[b]) < close() for a, b in pairs):
            text = f"its copies on the ranks of {name} drift apart, and are due to be the same"
            fix = f"reduce over {name} what it is updated from, or update it on one and broadcast"
            yield Story(("drift", name), text, (fix,))
            return


def _same_rows(have: Tensor, want: Tensor, dim: int) -> bool:
    if have.ndim <= dim or have.shape[dim] < 2:
        return distance(have, want) < close()
    a, b = (t.movedim(dim, 0).flatten(1) if t.ndim > 1 else t[:, None] for t in (have, want))
    random = torch.Generator().manual_seed(5)
    line = torch.randn(a.shape[1], dtype=torch.float64, generator=random)
    a, b = a[(a @ line).argsort()], b[(b @ line).argsort()]
    return distance(a, b) < close()


def zeros(have: Tensors, want: Tensors) -> Iterator[Story]:
    """Right where it is not zero."""
    ranks, rows = [], 0
    for rank, (h, w) in enumerate(zip(have, want, strict=True)):
        if distance(h, w) < close():
            continue
        lost = (h == 0) & (w != 0)
        scale = float(w.abs().max())
        if (
            not lost.any()
            or float((h - w)[~lost].abs().max() if (~lost).any() else 0) > close() * scale
        ):
            return
        ranks.append(rank)
        whole_rows = lost.flatten(1).any(1) if lost.ndim > 1 else lost
        rows += int(whole_rows.sum())
    if ranks:
        text = f"{rows} rows on ranks {', '.join(map(str, ranks))} are zero, and all others right"
        yield Story(("zeros",), text, ("look for rows that are dropped, or never sent back",))


def _gathered(have: Tensors, want: Tensors, axes: Axes) -> Iterator[Story]:
    """Shapes differ: a piece where the whole is due, or the whole where a piece is."""
    for name in axes.wide():
        for dim in range(want[0].ndim):
            if any(h.ndim != want[0].ndim for h in have):
                return
            joined = [[have[q] for q in axes.group(name, rank)] for rank in range(axes.world)]
            try:
                whole = [torch.cat(pieces, dim) for pieces in joined]
            except RuntimeError:
                continue
            if right(whole, want):
                fixes = (f"all-gather it over {name} on dim {dim}", f'out="{name} {dim}"')
                text = f"gathered over {name} on dim {dim} it is right"
                yield Story(("gather", name, str(dim)), text, fixes)


# --- what only one process can tell -------------------------------------------------------------


def lacks(
    name: str, have: Tensors, part: Callable[[Tensor, int], Tensor], axes: Axes, without: Without
) -> Iterator[Story]:
    """It is what one process computes without what the ranks at one place of an axis hold."""
    for axis in axes.wide():
        for place in range(axes.size(axis)):
            other = without(axis, place).get(name)
            if other is None:
                continue
            if right(have, [part(other, rank) for rank in range(axes.world)]):
                text = f"the part of rank {place} of {axis} is missing from it"
                fix = f"add the part of every rank of {axis}: an all-reduce over all of them"
                yield Story(("missing", axis), text, (fix,))
                return


def beside_a_bias(
    have: Tensors, want: Tensors, weights: Mapping[str, Tensor], axes: Axes
) -> Iterator[Story]:
    """A parameter that is added to every row: too often, or after what is wrong."""
    pairs = [(h.double(), w.double()) for h, w in zip(have, want, strict=True)]
    if any(h.shape != w.shape or h.ndim < 1 for h, w in pairs):
        return
    for name, weight in weights.items():
        if weight.ndim != 1 or any(h.shape[-1] != weight.shape[0] for h, _ in pairs):
            continue
        bias = weight.double()
        c = common_factor(
            [h - w for h, w in pairs if h.numel()],
            [bias.expand_as(h) for h, _ in pairs if h.numel()],
        )
        if c is not None:
            text = f"{name!r} is added {_ratio(c + 1)} times to every row, and once is right"
            fix = f"add {name!r} after the sum over ranks, or on one of them"
            yield Story(("bias", name), text, (fix,))
        without = [h - bias for h, _ in pairs], [w - bias for _, w in pairs]
        for story in (*_factor(*without, axes, "output"), *_summed(*without, axes, "")):
            text = f"before {name!r} is added, {story.text}"
            yield Story((*story.key, "before", name), text, story.fixes)
