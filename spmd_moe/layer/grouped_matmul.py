"""Grouped matmul: the rows of each expert times the matrix of that expert.

    rows of e0 | rows of e1 | (none of e2) | rows of e3 | rows past the last end
       @ w[0]      @ w[1]                      @ w[3]        never read

Two operations, `rows` and `outer`, compute the experts and derivatives of any order. torch's kernel
implements them for GPUs, a loop for CPUs and for dtypes and widths that the kernel lacks; users can
add others.
"""

# Shape letters in this file:
#   R  rows at this rank's experts, sorted by expert     e  experts on this rank
#   n  rows of one expert     A  width that goes in     B  width that comes out     D  model width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, final

import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.core.compute_dtype import as_dtype
from spmd_moe.core.errors import ShapeError, explain
from spmd_moe.core.validate import check_positive_ints
from spmd_moe.layer.grouped_mm_support import writes_empty_groups


class GroupedMatmul(Protocol):
    """Protocol of a grouped matmul: the rows of each expert times the matrix of that expert.

    `ends_e` is int32, on the device: where the rows of each expert end. Rows past the last end must
    not be read; what is written there does not matter.

    Example:
        >>> import torch
        >>> from spmd_moe import GroupedMatmul, Masked
        >>> matmul: GroupedMatmul = Masked()
        >>> ends = torch.tensor([1, 3], dtype=torch.int32)  # rows of two experts
        >>> tuple(matmul.rows(torch.ones(3, 8), torch.ones(2, 8, 4), ends).shape)
        (3, 4)
    """

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        """`y_RB`: every row times the matrix of its expert."""
        ...

    def outer(self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor) -> Tensor:
        """`dw_eBA`: for each expert, the transpose of its `dy` times its `x`."""
        ...


# --- what the experts call ----------------------------------------------------------------------


class RowGroups(NamedTuple):
    """The rows of each expert, and the grouped matmul that multiplies them."""

    matmul: GroupedMatmul
    ends_e: Tensor
    matmul_ends_e: Tensor  # the same, on the device where the matmul needs them

    @staticmethod
    def of(matmul: GroupedMatmul, counts_e: Tensor, read_e: Tensor | None = None) -> RowGroups:
        """`read_e`: the ends on the host, if forward has read them."""
        ends_e = counts_e.cumsum(0, dtype=torch.int32)
        if not isinstance(matmul, LoopedMatmul):
            return RowGroups(matmul, ends_e, ends_e)
        # One read for all matmuls of its loop.
        return RowGroups(matmul, ends_e, ends_e.cpu() if read_e is None else read_e)

    @property
    def read_e(self) -> Tensor | None:
        """The ends on the host, unless they are there already: reading them again would wait."""
        return None if self.matmul_ends_e is self.ends_e else self.matmul_ends_e

    def linear(self, x_RA: Tensor, w_eBA: Tensor, b_eB: Tensor | None = None) -> Tensor:
        """`y_RB`: `x @ w.T + b`, the weight as it is stored."""
        y_RB = self.rows(x_RA, w_eBA.transpose(1, 2))
        if b_eB is None:
            return y_RB
        # One bias of zeros, for rows past the last end. A checkpoint may keep y, so not in place.
        b_eB = fn.pad(as_dtype(b_eB, y_RB.dtype), (0, 0, 0, 1))
        return y_RB + b_eB.index_select(0, _expert_of_rows(y_RB, self.ends_e))

    def rows(self, x_RA: Tensor, w_eAB: Tensor) -> Tensor:
        """`y_RB`, in the dtype of `x`: every row times the matrix of its expert."""
        if torch.is_grad_enabled():
            return cast(Tensor, _Rows.apply(x_RA, w_eAB, self))  # type: ignore[no-untyped-call]  # torch
        if not isinstance(self.matmul, LoopedMatmul):  # which casts the weights of one at a time
            w_eAB = as_dtype(w_eAB, x_RA.dtype)
        return self.matmul.rows(x_RA, w_eAB, self.matmul_ends_e)

    def outer(self, dy_RB: Tensor, x_RA: Tensor, dtype: torch.dtype) -> Tensor:
        """`dw_eBA`: for each expert, the transpose of its `dy` times its `x`; zero without rows."""
        if torch.is_grad_enabled():
            return cast(Tensor, _Outer.apply(dy_RB, x_RA, dtype, self))  # type: ignore[no-untyped-call]  # torch
        if isinstance(self.matmul, LoopedMatmul):
            return self.matmul.outer(dy_RB, x_RA, self.matmul_ends_e, dtype)
        dw_eBA = as_dtype(self.matmul.outer(dy_RB, x_RA, self.ends_e), dtype)
        if isinstance(self.matmul, TorchGroupedMM) and writes_empty_groups(dw_eBA):
            return dw_eBA
        empty_e = self.ends_e.diff(prepend=self.ends_e.new_zeros(1)) == 0
        return dw_eBA.masked_fill_(empty_e.view(-1, 1, 1), 0)

    def total(self, dy_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """`db_eB`: the sum over the rows of each expert."""
        # A matmul with ones, not index_add: no atomics, and rows past the last end stay out of it.
        # 16 bytes is the narrowest row that grouped kernels take.
        ones = dy_RB.new_ones(dy_RB.shape[0], 16 // dy_RB.element_size())
        return self.outer(dy_RB, ones, dtype).select(2, 0).contiguous()

    def zero_past_the_end(self, y_R: Tensor) -> Tensor:
        """`y_R` with zeros in the rows that belong to no expert; it may have more dims."""
        past_R = _row_numbers(y_R) >= self.ends_e[-1]
        return y_R.masked_fill(past_R.view(-1, *[1] * (y_R.dim() - 1)), 0)


class _Rows(torch.autograd.Function):
    """`RowGroups.rows` as backward calls it when its gradients are to be differentiated again.

    Rows past the last end are zeros here, because another derivative may add them up.
    """

    @staticmethod
    def forward(ctx: Any, x_RA: Tensor, w_eAB: Tensor, groups: RowGroups) -> Tensor:
        ctx.save_for_backward(x_RA, w_eAB)
        ctx.groups = groups
        return groups.zero_past_the_end(groups.rows(x_RA.contiguous(), w_eAB))

    @staticmethod
    def backward(ctx: Any, dy_RB: Tensor) -> tuple[Tensor | None, ...]:
        (x_RA, w_eAB), groups, dx_RA, dw_eAB = ctx.saved_tensors, ctx.groups, None, None
        dy_RB = dy_RB.contiguous()
        if ctx.needs_input_grad[0]:
            dx_RA = groups.zero_past_the_end(groups.rows(dy_RB, w_eAB.transpose(1, 2)))
        if ctx.needs_input_grad[1]:
            dw_eAB = groups.outer(x_RA, dy_RB, w_eAB.dtype)
        return dx_RA, dw_eAB, None


class _Outer(torch.autograd.Function):
    """`RowGroups.outer`, in the same place."""

    @staticmethod
    def forward(
        ctx: Any, dy_RB: Tensor, x_RA: Tensor, dtype: torch.dtype, groups: RowGroups
    ) -> Tensor:
        ctx.save_for_backward(dy_RB, x_RA)
        ctx.groups = groups
        return groups.outer(dy_RB.contiguous(), x_RA.contiguous(), dtype)

    @staticmethod
    def backward(ctx: Any, grad_eBA: Tensor) -> tuple[Tensor | None, ...]:
        (dy_RB, x_RA), groups, ddy_RB, dx_RA = ctx.saved_tensors, ctx.groups, None, None
        grad_eBA = grad_eBA.contiguous()
        if ctx.needs_input_grad[0]:
            ddy_RB = groups.zero_past_the_end(groups.rows(x_RA, grad_eBA.transpose(1, 2)))
        if ctx.needs_input_grad[1]:
            dx_RA = groups.zero_past_the_end(groups.rows(dy_RB, grad_eBA))
        return ddy_RB, dx_RA, None, None


def _expert_of_rows(x_RA: Tensor, ends_e: Tensor) -> Tensor:
    """The expert of each row; past the last end, one that is not there."""
    return torch.searchsorted(ends_e, _row_numbers(x_RA), right=True)


def _row_numbers(x_R: Tensor) -> Tensor:
    # Not arange: made from x, the numbers have a type for a checker that follows types.
    column_R = x_R if x_R.ndim == 1 else x_R.select(1, 0)
    return torch.ones_like(column_R, dtype=torch.int32).cumsum(0) - 1


# --- grouped matmuls ----------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class TorchGroupedMM:
    """Grouped matmul by `torch.nn.functional.grouped_mm`; never waits for the device.

    Example:
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, TorchGroupedMM
        >>> config = MoEConfig(8, 16, RouterConfig(4, top_k=2))
        >>> layer = MoE(config, MoEMesh.single(), matmul=TorchGroupedMM())
    """

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        return fn.grouped_mm(x_RA, w_eAB, offs=ends_e)

    def outer(self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor) -> Tensor:
        return fn.grouped_mm(dy_RB.t(), x_RA, offs=ends_e)


@final
@dataclass(frozen=True, slots=True)
class Masked:
    """Grouped matmul with fixed shapes: all rows times every expert's matrix.

    Each row keeps the result of its expert. It works on any device, in any dtype and width, and
    reads nothing on the host. It costs as many times more as there are local experts; for a few
    rows, reading the weights dominates anyway.

    Example:
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, Masked
        >>> config = MoEConfig(8, 16, RouterConfig(4, top_k=2))
        >>> layer = MoE(config, MoEMesh.single(), matmul=Masked())
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


@final
@dataclass(frozen=True, slots=True)
class LoopedMatmul:
    """One expert after another, by plain matmuls; the host reads the counts once per call.

    Args:
        compute: Dtype of rows and weights in the matmuls. Default: that of the weights, or the
            autocast dtype.
        row_block: Pad the rows of an expert with zeros, for the matmul only, to a multiple of this.
            With 4, a row has the same bits in every batch, on one thread and with a hidden width
            that is a multiple of 32.

    Raises:
        ConfigError: `row_block` is not positive.

    Example:
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, LoopedMatmul
        >>> config = MoEConfig(8, 16, RouterConfig(4, top_k=2))
        >>> layer = MoE(config, MoEMesh.single(), matmul=LoopedMatmul(row_block=4))
    """

    compute: torch.dtype | None = None
    row_block: int = 1

    def __post_init__(self) -> None:
        check_positive_ints("LoopedMatmul", row_block=self.row_block)

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.spmd_moe.rows.default(x_RA, w_eAB, ends_e, self.row_block))

    def outer(
        self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or x_RA.dtype
        return cast(Tensor, torch.ops.spmd_moe.outer.default(dy_RB, x_RA, ends_e, dtype))


def _rows(x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor, row_block: int) -> Tensor:
    if _is_differentiated(x_RA, w_eAB):
        groups = RowGroups(LoopedMatmul(row_block=row_block), ends_e, ends_e)
        return cast(Tensor, _Rows.apply(x_RA, w_eAB, groups))  # type: ignore[no-untyped-call]  # torch
    y_RB = x_RA.new_empty(x_RA.shape[0], w_eAB.shape[2])
    for e, x_nA, y_nB in _by_expert(ends_e, x_RA, y_RB):
        if e is None:
            y_nB.zero_()
            continue
        w_AB, missing = as_dtype(w_eAB[e], x_RA.dtype), -x_nA.shape[0] % row_block
        if missing:
            y_nB.copy_(torch.mm(fn.pad(x_nA, (0, 0, 0, missing)), w_AB)[: x_nA.shape[0]])
        else:
            torch.mm(x_nA, w_AB, out=y_nB)
    return y_RB


def _outer(dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
    if _is_differentiated(dy_RB, x_RA):
        groups = RowGroups(LoopedMatmul(), ends_e, ends_e)
        return cast(Tensor, _Outer.apply(dy_RB, x_RA, dtype, groups))  # type: ignore[no-untyped-call]  # torch
    dw_eBA = x_RA.new_empty(ends_e.shape[0], dy_RB.shape[1], x_RA.shape[1], dtype=dtype)
    empty = set(range(ends_e.shape[0]))
    for e, dy_nB, x_nA in _by_expert(ends_e, dy_RB, x_RA):
        if e is None:
            continue
        empty.remove(e)
        if dtype is x_RA.dtype:
            torch.mm(dy_nB.t(), x_nA, out=dw_eBA[e])
        else:
            dw_eBA[e].copy_(torch.mm(dy_nB.t(), x_nA))
    for e in empty:
        dw_eBA[e].zero_()
    return dw_eBA


def _is_differentiated(*tensors: Tensor) -> bool:
    """An exported graph calls the operators outside of the experts' autograd function."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _by_expert(ends_e: Tensor, *rows: Tensor) -> Iterator[Any]:
    """Each expert that has rows, and its part of each tensor; at last None, and the rows of none.

    All views are made before the first matmul: after it, whose weight has filled the caches, each
    takes four times as long.
    """
    begin, experts, sizes = 0, list[int | None](), list[int]()
    for e, end in enumerate(ends_e.tolist()):
        if end > begin:
            experts.append(e)
            sizes.append(end - begin)
        begin = end
    rest = rows[0].shape[0] - begin
    if rest < 0:
        raise ShapeError(
            explain(
                "Experts",
                f"x_RD has {rows[0].shape[0]} rows, the counts sum to {begin}",
                why="every counted row must be there",
                fixes=[
                    "counts_e = expert_ids_R.bincount(minlength=num_local)   # of rows that came"
                ],
            )
        )
    parts = [t.split_with_sizes([*sizes, rest]) for t in rows]
    return zip([*experts, None], *parts, strict=True)


# The length of the loop and its slices are data. As operators, they are no concern of a compiler,
# of fake tensors, or of LocalTensorMode, which runs them once for every rank that it simulates.
_OPERATORS = torch.library.Library("spmd_moe", "DEF")
for _schema, _run, _fake in (
    (
        "rows(Tensor x, Tensor w, Tensor ends, int row_block) -> Tensor",
        _rows,
        lambda x, w, ends, row_block: x.new_empty(x.shape[0], w.shape[2]),
    ),
    (
        "outer(Tensor dy, Tensor x, Tensor ends, ScalarType dtype) -> Tensor",
        _outer,
        lambda dy, x, ends, dtype: x.new_empty(ends.shape[0], dy.shape[1], x.shape[1], dtype=dtype),
    ),
):
    _name = _OPERATORS.define(_schema)
    _OPERATORS.impl(_name, _run, "CompositeExplicitAutograd")
    _OPERATORS.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"spmd_moe::{_name}", _fake)
