"""The experts one after another, or a few together: two loops, and the same as two operators.

A loop's length and its slices are data, so the row counts must be known on the host. Hidden in an
operator, a loop is no concern of torch.compile (no graph break), of fake tensors (they ask for the
shapes only), or of LocalTensorMode (it runs the operator once per rank, on that rank's counts).
Where nobody follows operators the loop is called as it is: to call an operator takes as long as
several of its small steps.
"""

# Shape letters in this file:
#   R  rows at this rank's experts, sorted by expert     n  rows of one group of experts
#   D  model width     F  hidden width of an expert      e  experts on this rank

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spmd_moe.core.dtypes import as_dtype
from spmd_moe.core.errors import ShapeError, explain
from spmd_moe.core.torch_state import is_traced
from spmd_moe.layer.activations import ACTIVATIONS
from spmd_moe.layer.grouped_ffn import (
    Call,
    Gradients,
    Hidden,
    Needs,
    Weights,
    gradients,
    hidden,
    output,
)
from spmd_moe.layer.grouped_matmul import SomeExperts

TOGETHER = 32  # rows of neighbouring experts, up to which they share the steps between the matmuls
WORTH_PAGES = 1 << 20  # bytes, below which memory of its own costs more than writing zeros
_CALL = (
    "Tensor x, Tensor? scores, Tensor?[] weights, Tensor sizes, str activation, "
    "ScalarType compute, int row_block"
)
_LIBRARY = torch.library.Library("spmd_moe", "DEF")
_LIBRARY.define(f"experts_forward({_CALL}, bool keep) -> Tensor[]")
_LIBRARY.define(f"experts_backward({_CALL}, Tensor dy, Tensor[] kept, bool[] needs) -> Tensor[]")


def forward(
    call: Call, sizes_e: Tensor, compute: torch.dtype, row_block: int, *, keep: bool
) -> tuple[Tensor, Hidden | None]:
    """`y_RD`, and `gate` and `up` if they are to be kept. `sizes_e` lies on the CPU."""
    if is_traced(sizes_e, *call.tensors()):
        flat = _Flat.of(call, sizes_e, compute, row_block)
        y_RD, *kept = torch.ops.spmd_moe.experts_forward.default(*flat, keep)
    else:
        y_RD, *kept = _forward_loop(call, sizes_e, compute, row_block, keep)
    return y_RD, _hidden(kept)


def backward(
    call: Call,
    sizes_e: Tensor,
    compute: torch.dtype,
    row_block: int,
    dy_RD: Tensor,
    kept: Hidden | None,
    needs: Needs,
) -> Gradients:
    """What is needed; `gate` and `up` are computed again if not kept."""
    given = [] if kept is None else [t for t in kept if t is not None]
    if is_traced(dy_RD, sizes_e, *call.tensors()):
        flat = _Flat.of(call, sizes_e, compute, row_block)
        grads = torch.ops.spmd_moe.experts_backward.default(*flat, dy_RD, given, list(needs))
    else:
        grads = _backward_loop(call, sizes_e, compute, row_block, dy_RD, given, needs)
    found = iter(grads)
    return Gradients(*(next(found) if need else None for need in needs))


def _hidden(kept: Sequence[Tensor]) -> Hidden | None:
    if not kept:
        return None
    return Hidden(kept[0], kept[1] if len(kept) > 1 else None)


# ---- the loops ----


class Neighbours(NamedTuple):
    """Experts that are computed together, and how many rows each of them has."""

    experts: list[int]
    parts: list[int]


class _Hits(NamedTuple):
    """The experts that have rows, and where those are."""

    groups: list[Neighbours]
    parts: list[int]
    """Rows of each group, and at last the rows that belong to none."""

    def each(
        self, call: Call, compute: torch.dtype, row_block: int, *others: Tensor | None
    ) -> Iterator[tuple[SomeExperts, Call, list[Any]]]:
        """Each group, its part of the call in the dtype of the matmuls, and of the other rows."""
        w1_eFD = call.w.w1_eFD
        scratch = None
        if compute is not w1_eFD.dtype:
            scratch = w1_eFD.new_empty(w1_eFD[0].numel(), dtype=compute)
        # All views are made before the first product; `SomeExperts` says why.
        views = map(self._split, (call.x_RD, call.scores_R, *others))
        for group, x_nD, scores_n, *others_n in zip(self.groups, *views, strict=True):
            part = Call(as_dtype(x_nD, compute), scores_n, call.w, call.activation)
            yield SomeExperts(group.experts, group.parts, row_block, scratch), part, others_n

    def _split(self, t: Tensor | None) -> Sequence[Any]:
        """One view for each group; Nones of None."""
        if t is None or self.parts == [t.shape[0], 0]:
            return [t] * len(self.groups)
        return cast(Sequence[Tensor], t.split_with_sizes(self.parts)[:-1])  # torch does not type it

    def zero_the_rest(self, t: Tensor) -> Tensor:
        """Zeros in the rows that belong to no expert."""
        if self.parts[-1]:
            t.narrow(0, t.shape[0] - self.parts[-1], self.parts[-1]).zero_()
        return t


def _hits(sizes: list[int], x_RD: Tensor) -> _Hits:
    groups = neighbours(sizes)
    parts = [sum(group.parts) for group in groups]
    rest = x_RD.shape[0] - sum(parts)
    if rest < 0:
        raise ShapeError(
            explain(
                "Experts",
                f"x_RD has {x_RD.shape[0]} rows, the counts sum to {sum(sizes)}",
                why="every counted row must be there",
                fixes=[
                    "counts_e = expert_ids_R.bincount(minlength=num_local)   # of rows that came"
                ],
            )
        )
    return _Hits(groups, [*parts, rest])


def neighbours(sizes: Sequence[int]) -> list[Neighbours]:
    """Neighbours with few rows together, so that small steps are fewer; others each alone, so that
    what lies between the matmuls stays in cache."""
    groups: list[Neighbours] = []
    left = 0  # rows that still go with the last group
    for e, size in enumerate(sizes):
        if not size:
            continue
        if size > left:
            groups.append(Neighbours([], []))
            left = max(TOGETHER, size)
        group = groups[-1]
        group.experts.append(e)
        group.parts.append(size)
        left -= size
    return groups


def _forward_loop(
    call: Call, sizes_e: Tensor, compute: torch.dtype, row_block: int, keep: bool
) -> list[Tensor]:
    hits = _hits(sizes_e.tolist(), call.x_RD)
    y_RD, *kept = _empty_outputs(call, compute, keep)
    for block, part, (y_nD, *kept_n) in hits.each(call, compute, row_block, y_RD, *kept):
        hid = hidden(block, part, _hidden(kept_n))
        y = output(block, part, hid, y_nD)
        for place, computed in (*zip(kept_n, hid, strict=False), (y_nD, y)):
            if computed is not place:
                place.copy_(computed)
    return [hits.zero_the_rest(y_RD), *kept]


def _backward_loop(
    call: Call,
    sizes_e: Tensor,
    compute: torch.dtype,
    row_block: int,
    dy_RD: Tensor,
    kept: Sequence[Tensor],
    needs: Needs,
) -> list[Tensor]:
    sizes = sizes_e.tolist()
    hits, starved = _hits(sizes, call.x_RD), [e for e, size in enumerate(sizes) if not size]
    room = _room(call, needs, lambda w: _of_weight(w, starved))
    for block, part, (dx_nD, ds_n, dy_nD, *kept_n) in hits.each(
        call, compute, row_block, room.x_RD, room.scores_R, dy_RD, *kept
    ):
        hid = _hidden([as_dtype(t, compute) for t in kept_n]) or hidden(block, part)
        found = gradients(block, part, hid, as_dtype(dy_nD, compute), needs, room)
        for place, computed in ((dx_nD, found.x_RD), (ds_n, found.scores_R)):
            if place is not None and computed is not None:
                place.copy_(computed)
    for rows in (room.x_RD, room.scores_R):
        if rows is not None:
            hits.zero_the_rest(rows)
    return _asked_for(room)


def _empty_outputs(call: Call, compute: torch.dtype, keep: bool) -> list[Tensor]:
    """Room for `y_RD` and, to be kept, `gate_RF` and `up_RF`, in the narrower of the two dtypes."""
    x_RD, y_RD = call.x_RD, _empty(call.x_RD)
    if not keep:
        return [y_RD]
    dtype = min(compute, x_RD.dtype, key=lambda dtype: dtype.itemsize)
    R, F = x_RD.shape[0], call.w.w1_eFD.shape[1]
    return [y_RD, *(x_RD.new_empty(R, F, dtype=dtype) for _ in range(1 + call.activation.gated))]


def _empty(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _of_weight(w: Tensor, starved: Sequence[int]) -> Tensor:
    """Room for the gradients of a weight: zeros for the experts that have no rows.

    With few tokens these are most, and writing their zeros would be most of backward. Where most
    experts have rows, memory that malloc has kept is quicker than fresh pages.
    """
    mostly = 2 * len(starved) > w.shape[0]
    if mostly and w.nbytes >= WORTH_PAGES and w.device.type == "cpu":
        return untouched_zeros(w)
    d_e = _empty(w)
    for e in starved:
        d_e[e].zero_()
    return d_e


def untouched_zeros(t: Tensor) -> Tensor:
    """Zeros of the shape of `t`, of which the system makes a page when it is first written."""
    if sys.platform == "win32":
        return torch.zeros_like(t, memory_format=torch.contiguous_format)
    pages = mmap.mmap(-1, t.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a system that has none
            pages.madvise(mmap.MADV_HUGEPAGE)  # to make many small ones takes three times as long
    return torch.frombuffer(pages, dtype=t.dtype).view(t.shape)


def _room(call: Call, needs: Needs, of_weight: Callable[[Tensor], Tensor] = _empty) -> Gradients:
    makers = [_empty] * 2 + [of_weight] * len(call.w)
    each = zip(makers, call.tensors(), needs, strict=True)
    return Gradients(*(make(t) if need and t is not None else None for make, t, need in each))


def _asked_for(found: Gradients) -> list[Tensor]:
    return [t for t in found if t is not None]


# ---- the same as operators ----


class _Flat(NamedTuple):
    """What both operators are given, as a schema can say it."""

    x_RD: Tensor
    scores_R: Tensor | None
    weights: Sequence[Any]
    sizes_e: Tensor
    activation: str
    compute: torch.dtype
    row_block: int

    @staticmethod
    def of(call: Call, sizes_e: Tensor, compute: torch.dtype, row_block: int) -> _Flat:
        x_RD, scores_R, w, activation = call
        return _Flat(x_RD, scores_R, list(w), sizes_e, activation.name, compute, row_block)

    def call(self) -> Call:
        w = Weights(*self.weights)
        return Call(self.x_RD, self.scores_R, w, ACTIVATIONS[self.activation])


def _forward_operator(*given: Any) -> list[Tensor]:
    flat, (keep,) = _unpacked(given)
    return _forward_loop(flat.call(), flat.sizes_e, flat.compute, flat.row_block, keep)


def _forward_shapes(*given: Any) -> list[Tensor]:
    flat, (keep,) = _unpacked(given)
    return _empty_outputs(flat.call(), flat.compute, keep)


def _backward_operator(*given: Any) -> list[Tensor]:
    flat, (dy_RD, kept, needs) = _unpacked(given)
    how = (flat.compute, flat.row_block)
    return _backward_loop(flat.call(), flat.sizes_e, *how, dy_RD, kept, Needs(*needs))


def _backward_shapes(*given: Any) -> list[Tensor]:
    flat, (_dy_RD, _kept, needs) = _unpacked(given)
    return _asked_for(_room(flat.call(), Needs(*needs)))


def _unpacked(given: tuple[Any, ...]) -> tuple[_Flat, tuple[Any, ...]]:
    """What both operators are given, and what is one's own."""
    shared = len(_Flat._fields)
    return _Flat(*given[:shared]), given[shared:]


for _name, _operator, _shapes in (
    ("experts_forward", _forward_operator, _forward_shapes),
    ("experts_backward", _backward_operator, _backward_shapes),
):
    _LIBRARY.impl(_name, _operator, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # it has no graph to keep
    torch.library.register_fake(f"spmd_moe::{_name}", _shapes)
