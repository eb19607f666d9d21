"""Grouped matmul: each expert's rows times that expert's matrix, behind one seam.

    rows of e0 | rows of e1 | (none of e2) | rows of e3 | rows past the last end
       @ w[0]      @ w[1]                      @ w[3]        never read

An object with `rows` and `outer` is a grouped matmul and may be given to the experts: a tuned
library, a kernel of one's own. `PerExpert` is the other way to do it: the experts are computed one
after another with plain matmuls. That is what a CPU does best (an expert's activations stay in
cache) and what remains for dtypes and widths that grouped kernels refuse.
"""

# Shape letters in this file:
#   R  rows at this rank's experts, sorted by expert     e  experts on this rank
#   n  rows of one expert     A  width that goes in     B  width that comes out     D  model width

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, final

import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.validate import check_positive_ints, describe_value


class GroupedMatmul(Protocol):
    """The seam: all experts at once. `ends_e` int32, on the device: where each expert's rows end.

    Rows past the last end must not be read; what is written there does not matter.
    """

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        """`y_RB`: every row times the matrix of its expert."""
        ...

    def outer(self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor) -> Tensor:
        """`dw_eBA`: per expert, the transpose of its `dy` times its `x`; zero without rows."""
        ...


@final
@dataclass(frozen=True, slots=True)
class TorchGroupedMM:
    """torch.nn.functional.grouped_mm: never waits for the device."""

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        return fn.grouped_mm(x_RA, w_eAB, offs=ends_e)

    def outer(self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor) -> Tensor:
        return fn.grouped_mm(dy_RB.t(), x_RA, offs=ends_e)


@final
@dataclass(frozen=True, slots=True)
class Masked:
    """All rows times every expert's matrix, of which each row keeps one.

    Slow, but of fixed shapes on any device, in any dtype and width, and it reads nothing: what
    remains where a grouped kernel does not go and the host must not wait. When decoding, reading
    the weights takes longer than multiplying a few rows by them.
    """

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        y_RB = x_RA.new_zeros(x_RA.shape[0], w_eAB.shape[2])
        for w_AB, mine_R1 in zip(w_eAB.unbind(0), _members(x_RA, ends_e), strict=True):
            y_RB = torch.where(mine_R1, x_RA @ w_AB, y_RB)
        return y_RB

    def outer(self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor) -> Tensor:
        members = _members(x_RA, ends_e)
        # Rows of no expert may be anything, NaN too, and 0 times NaN is no 0.
        past_R1 = (_row_numbers(x_RA) >= ends_e[-1]).unsqueeze(1)
        x_RA = x_RA.masked_fill(past_R1, 0)
        return torch.stack([torch.where(mine, dy_RB, 0).t() @ x_RA for mine in members])


def _members(x_RA: Tensor, ends_e: Tensor) -> Sequence[Tensor]:
    """Of each expert, a column that is True in its rows."""
    expert_R = _expert_of_rows(x_RA, ends_e)
    return [(expert_R == expert).unsqueeze(1) for expert in range(ends_e.shape[0])]


def _expert_of_rows(x_RA: Tensor, ends_e: Tensor) -> Tensor:
    """The expert of each row; past the last end, one that is not there."""
    return torch.searchsorted(ends_e, _row_numbers(x_RA), right=True)


def _row_numbers(x_R: Tensor) -> Tensor:
    # Not arange: made from x, the numbers have a type for a checker that follows types.
    column_R = x_R if x_R.ndim == 1 else x_R.select(1, 0)
    return torch.ones_like(column_R, dtype=torch.int32).cumsum(0).sub_(1)


@final
@dataclass(frozen=True, slots=True)
class PerExpert:
    """One expert after another, by plain matmuls; reads the row counts on the host once per call.

    `compute` is the dtype that an expert's rows and weights are taken to before the matmuls, and
    each result is rounded once. Without it that is the weights' own, or what autocast asks for.

    `row_block` adds zero rows, for the matmul only, up to a multiple of itself: BLAS takes another
    kernel for 1 to 3 rows (float32) or for the rows beyond a multiple of 4 (float64), and with
    row_block=4 a row has the same bits whatever shares its expert, on one thread and if the hidden
    width is a multiple of 32: torch's elementwise kernels finish what is left of a tensor, or of a
    thread's part of it, another way.
    """

    compute: torch.dtype | None = None
    row_block: int = 1

    def __post_init__(self) -> None:
        check_positive_ints("PerExpert", row_block=self.row_block)


Matmul: TypeAlias = GroupedMatmul | PerExpert


def check_matmul(where: str, matmul: object) -> None:
    """One of the two, or None, which leaves the choice to `choose_matmul`."""
    if matmul is None or isinstance(matmul, PerExpert):
        return
    methods = (getattr(matmul, name, None) for name in ("rows", "outer"))
    if isinstance(matmul, type) or not all(map(callable, methods)):
        raise ConfigError(
            explain(
                where,
                f"matmul is {describe_value(matmul)}; "
                "it must be a PerExpert, or an object with the methods rows and outer",
                why="the experts multiply by it, forward and backward",
                fixes=["matmul=PerExpert(row_block=4)", "matmul=None   # what suits the device"],
            )
        )


# Made once: every call of the layer chooses.
_CPU = torch.device("cpu")
_AS_THEY_ARE, _IN_FLOAT32 = PerExpert(), PerExpert(compute=torch.float32)


def choose_matmul(
    dtype: torch.dtype, device: torch.device, widths: tuple[int, ...], fixed: bool = False
) -> Matmul:
    """What suits matmuls in this dtype, on this device, with rows of these widths.

    `fixed`: the host must not wait. Before compute capability 9, torch's grouped_mm does.
    """
    # Only of other devices than the usual: their type is a string, made anew whenever it is asked.
    if device != _CPU and device.type == "cuda":
        aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
        oldest = 9 if fixed else 8
        newer = torch.cuda.get_device_capability(device)[0] >= oldest
        if dtype is torch.bfloat16 and aligned and newer:
            return TorchGroupedMM()
        return Masked() if fixed else _AS_THEY_ARE
    if fixed:
        return Masked()
    if dtype in _WIDENED_ON_THIS_CPU and device.type == "cpu":
        return _IN_FLOAT32
    return _AS_THEY_ARE


def _widened_on_this_cpu() -> frozenset[torch.dtype]:
    # Without matmul units for a half precision, torch's CPU matmuls in it are 10 to 30 times slower
    # than float32, and round at every step.
    units = [name for name, present in torch.cpu.get_capabilities().items() if present]
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return frozenset(
        dtype for dtype, suffix in half.items() if not any(u.endswith(suffix) for u in units)
    )


_WIDENED_ON_THIS_CPU = _widened_on_this_cpu()


class Block(Protocol):
    """What the experts' mathematics needs from a set of rows and the weights of their experts."""

    def linear(self, x_RA: Tensor, w_eBA: Tensor, room_RB: Tensor | None) -> Tensor:
        """`y_RB`, `x @ w.T`: the weight as it lies in memory. `room` may be used for the result."""
        ...

    def rows(self, x_RA: Tensor, w_eAB: Tensor, onto: Tensor | None = None) -> Tensor:
        """`y_RB`, `x @ w`, added to `onto` (which is used up) where given."""
        ...

    def outer(self, dy_RB: Tensor, x_RA: Tensor, out_eBA: Tensor | None) -> Tensor:
        """`dw_eBA`, written into `out_eBA` where given."""
        ...

    def plus(self, y_RB: Tensor, b_eB: Tensor) -> Tensor:
        """`y_RB`, which is used up, with the bias of its expert added to each row."""
        ...

    def total(self, dy_RB: Tensor, out_eB: Tensor | None) -> Tensor:
        """`db_eB`: the sum over the rows of each expert."""
        ...


@final
class AllExperts:
    """A block of all experts' rows, for a grouped matmul."""

    def __init__(self, matmul: GroupedMatmul, counts_e: Tensor) -> None:
        self._matmul = matmul
        self._ends_e = counts_e.cumsum(0).to(torch.int32)

    def linear(self, x_RA: Tensor, w_eBA: Tensor, room_RB: Tensor | None) -> Tensor:
        return self._matmul.rows(x_RA, w_eBA.transpose(1, 2), self._ends_e)

    def rows(self, x_RA: Tensor, w_eAB: Tensor, onto: Tensor | None = None) -> Tensor:
        y_RB = self._matmul.rows(x_RA, w_eAB, self._ends_e)
        return y_RB if onto is None else onto.add_(y_RB)

    def outer(self, dy_RB: Tensor, x_RA: Tensor, out_eBA: Tensor | None) -> Tensor:
        return self._matmul.outer(dy_RB, x_RA, self._ends_e)

    def plus(self, y_RB: Tensor, b_eB: Tensor) -> Tensor:
        expert_R = _expert_of_rows(y_RB, self._ends_e)
        return y_RB.add_(b_eB.index_select(0, expert_R.clamp(max=b_eB.shape[0] - 1)))

    def total(self, dy_RB: Tensor, out_eB: Tensor | None) -> Tensor:
        # A matmul with ones, not index_add: no atomics, and rows past the last end stay out of it.
        # 16 bytes is the narrowest row that grouped kernels take.
        ones = dy_RB.new_ones(dy_RB.shape[0], 16 // dy_RB.element_size())
        return self._matmul.outer(dy_RB, ones, self._ends_e).select(2, 0).contiguous()

    def zero_past_the_end(self, y_R: Tensor) -> Tensor:
        """Zeros in the rows that belong to no expert; `y_R` is used up, and may have more dims."""
        past_R = _row_numbers(y_R) >= self._ends_e[-1]
        return y_R.masked_fill_(past_R.view(-1, *[1] * (y_R.dim() - 1)), 0)


@final
@dataclass(frozen=True, slots=True)
class SomeExperts:
    """A block of the rows of some experts, for plain matmuls; it finds their weights among all."""

    experts: Sequence[int]
    parts: Sequence[int]
    """How many rows each of them has."""
    row_block: int
    scratch: Tensor | None
    """Room for one weight in the dtype of the rows, where the weights have another."""

    def linear(self, x_RA: Tensor, w_eBA: Tensor, room_RB: Tensor | None) -> Tensor:
        if room_RB is None or room_RB.dtype is not x_RA.dtype:
            room_RB = x_RA.new_empty(x_RA.shape[0], w_eBA.shape[1])
        plain, mm = self.scratch is None, self._product()
        for w, (x_nA, y_nB) in self._each(w_eBA.mT if plain else w_eBA, x_RA, room_RB):
            mm(x_nA, w if plain else self._cast(w).t(), out=y_nB)
        return room_RB

    def rows(self, x_RA: Tensor, w_eAB: Tensor, onto: Tensor | None = None) -> Tensor:
        y_RB = x_RA.new_empty(x_RA.shape[0], w_eAB.shape[2]) if onto is None else onto
        mm = self._product()
        for w_AB, (x_nA, y_nB) in self._each(w_eAB, x_RA, y_RB):
            w_AB = self._cast(w_AB)
            if onto is None:
                mm(x_nA, w_AB, out=y_nB)
            else:
                y_nB.addmm_(x_nA, w_AB)
        return y_RB

    def outer(self, dy_RB: Tensor, x_RA: Tensor, out_eBA: Tensor | None) -> Tensor:
        assert out_eBA is not None
        for out_BA, (dy_nB, x_nA) in self._each(out_eBA, dy_RB, x_RA):
            # Of one row there is nothing to add up, and each times each takes half of a matmul.
            product = torch.mul if dy_nB.shape[0] == 1 else torch.mm
            if self.scratch is None:
                product(dy_nB.t(), x_nA, out=out_BA)
            else:
                out_BA.copy_(product(dy_nB.t(), x_nA, out=self.scratch.view(out_BA.shape)))
        return out_eBA

    def plus(self, y_RB: Tensor, b_eB: Tensor) -> Tensor:
        for b_B, (y_nB,) in self._each(b_eB, y_RB):
            y_nB.add_(b_B)
        return y_RB

    def total(self, dy_RB: Tensor, out_eB: Tensor | None) -> Tensor:
        assert out_eB is not None
        for out_B, (dy_nB,) in self._each(out_eB, dy_RB):
            out_B.copy_(dy_nB.sum(0))
        return out_eB

    def _each(self, t_e: Tensor, *rows: Tensor) -> Iterable[tuple[Tensor, tuple[Tensor, ...]]]:
        """Of each expert its part of `t_e`, and its rows of each tensor.

        All views are made first: after a product, whose weight has filled the caches, one takes
        four times as long.
        """
        mine = [t_e[e] for e in self.experts]
        if len(mine) == 1:
            return [(mine[0], rows)]
        views = zip(*[t.split_with_sizes(self.parts) for t in rows], strict=True)
        return zip(mine, views, strict=True)

    def _cast(self, w: Tensor) -> Tensor:
        return w if self.scratch is None else self.scratch.view(w.shape).copy_(w)

    def _product(self) -> Callable[..., Tensor]:
        return torch.mm if self.row_block == 1 else self._in_blocks

    def _in_blocks(self, x_nA: Tensor, w_AB: Tensor, *, out: Tensor) -> Tensor:
        missing = -x_nA.shape[0] % self.row_block
        if not missing:
            return torch.mm(x_nA, w_AB, out=out)
        padded = fn.pad(x_nA, (0, 0, 0, missing))
        return out.copy_(torch.mm(padded, w_AB)[: x_nA.shape[0]])
