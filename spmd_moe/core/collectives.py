"""The differentiable collectives: `Move` for a row of the table, `Exchange` for ragged rows.

Data moves between ranks in this file and in `moves.py` alone: `host_values.py` exchanges settings,
and storing whole models is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed._functional_collectives as funcol
from spmd_types import (
    MeshAxis,
    SpmdTypeError,
    get_local_type,
    get_partition_spec,
    reinterpret,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd_moe.core.autograd_function import apply
from spmd_moe.core.errors import MeshError, explain
from spmd_moe.core.mesh import Axis
from spmd_moe.core.moves import Step, awaitable, wait_for
from spmd_moe.core.placement import P, Role, V
from spmd_moe.core.spmd_types_compat import rules
from spmd_moe.core.torch_modes import is_unchecked
from spmd_moe.core.validate import describe_value

Dtype: TypeAlias = torch.dtype | None


class Move(torch.autograd.Function):
    """Run a step. `dtype` is what a sum is taken in, `grad_dtype` the same in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup, step: Step, dtype: Dtype, grad_dtype: Dtype
    ) -> Tensor:
        ctx.back = group, step.backward(), grad_dtype, dtype
        y = step.row.run(x if dtype is None else x.to(dtype), group, step)
        return y if dtype is None else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return wait_for(move(grad, *ctx.back)), None, None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, group: ProcessGroup, step: Step) -> object:
        return step.row.rule(x, group, src=step.src, dst=step.dst)


def move(
    x: Tensor, group: ProcessGroup, step: Step, dtype: Dtype = None, grad_dtype: Dtype = None
) -> Tensor:
    """`Move`, with types."""
    return apply(Move, x, group, step, dtype, grad_dtype)


class Exchange(torch.autograd.Function):
    """Send rows to other ranks: `sends[r]` of them to rank r, `receives[r]` from it.

    rank 0 has  a b c   sends 1 2          rank 0 gets  a d
    rank 1 has  d e     sends 1 1    ==>   rank 1 gets  b c e
    Backward is the same exchange with the two lists swapped.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup, receives: list[int], sends: list[int]
    ) -> Tensor:
        ctx.back = group, sends, receives
        moved = funcol.all_to_all_single(x.contiguous(), receives, sends, group)
        return awaitable(moved, "all_to_all")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, receives, sends = ctx.back
        moved = exchange(grad, group, receives=receives, sends=sends)
        return wait_for(moved), None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, group: ProcessGroup) -> object:
        # Which rows a rank gets is data, so there is no whole on this axis that could be followed.
        spec = get_partition_spec(x)
        if spec is not None and MeshAxis.of(group) in spec.axes_with_partition_spec():
            raise SpmdTypeError("exchange: rows go where data says; check it in a local region")
        kinds = get_local_type(x)
        if any(kind is not V for kind in kinds.values()):
            raise SpmdTypeError(f"exchange: rows must be V on every axis, but are {kinds}")
        return rules.einsum("...->...", x)


def exchange(
    x: Tensor, group: ProcessGroup, *, receives: Sequence[int], sends: Sequence[int]
) -> Tensor:
    """Send rows of `x` to other ranks: an all-to-all with a different number of rows for each rank.

    Backward is the same exchange with the two lists swapped.

    Args:
        x: Rows sorted by destination rank.
        group: The process group.
        receives: Rows that this rank receives from each rank.
        sends: Rows that this rank sends to each rank; their sum is `x.shape[0]`.

    Returns:
        The received rows, sorted by source rank. In a group of one rank, `x` itself.

    Raises:
        RuntimeError: By torch, if `sends` does not match the rows of `x`.

    Example:
        >>> import torch
        >>> from spmd_moe import EP, MoEMesh, exchange
        >>> group = MoEMesh.single()[EP].group
        >>> exchange(torch.ones(3, 2), group, receives=[3], sends=[3]).shape
        torch.Size([3, 2])
    """
    if group.size() == 1:
        return x
    return apply(Exchange, x, group, list(receives), list(sends))


def declare_sum(x: Tensor, axis: Axis | ProcessGroup) -> Tensor:
    """Declare that each rank holds a summand: V becomes P. Values do not change.

    Use it where a contraction runs over a dim that is sharded over the ranks, or where each rank
    fills its own entries and leaves the others zero. It is the only way to make a P.

    Args:
        x: The summand of this rank.
        axis: `mesh[TP]`, or a process group, over which the summands add up.

    Returns:
        `x`, typed as P on the axis when a checker runs.

    Raises:
        MeshError: `axis` is neither an axis nor a process group.
        PlacementError: By a checker, if `x` is not V on the axis.

    Example:
        >>> import torch
        >>> from spmd_moe import TP, MoEMesh, P, R, declare_sum, redistribute
        >>> tp = MoEMesh.single()[TP]
        >>> counts = torch.tensor([3, 1])  # of this rank
        >>> redistribute(declare_sum(counts, tp), tp, src=P, dst=R)
        tensor([3, 1])
    """
    group, ranks = ranks_of("declare_sum", axis)
    if ranks == 1 or is_unchecked():
        return x
    declared: Tensor = reinterpret(x, group, src=V, dst=P)
    return declared


def ranks_of(where: str, axis: Axis | ProcessGroup) -> tuple[ProcessGroup, int]:
    """The group, and how many ranks it has."""
    if isinstance(axis, Axis):
        return axis.group, axis.size
    if isinstance(axis, ProcessGroup):
        return axis, axis.size()
    raise _no_axis(where, axis)


def _no_axis(where: str, axis: object) -> MeshError:
    name = axis if isinstance(axis, str) else "tp"
    role = repr(axis) if isinstance(axis, Role) else name.upper()
    return MeshError(
        explain(
            where,
            f"axis is {describe_value(axis)}; it must be an Axis or a ProcessGroup",
            why="the ranks that share x are those of an axis of a mesh",
            fixes=[f"axis=mesh[{role}]   # mesh is a MoEMesh"],
        )
    )
