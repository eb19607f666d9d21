"""Take a tensor from one kind to another on one mesh axis, given how its rows are shared out.

`plan` is pure: kinds and sizes in, a `Step` out, every shape error raised, cached. Applying a step
is `collectives.Move`, which cannot fail for a shape's sake.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias, TypeVar, final

import torch
import torch.distributed as dist
from spmd_types import PerMeshAxisLocalSpmdType, Shard, convert
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd_moe.core.collectives import Dtype, move, ranks_of
from spmd_moe.core.errors import (
    DtypeError,
    PlacementError,
    ShapeError,
    SpmdMoeError,
    describe,
    explain,
    plural,
    short_dtype,
)
from spmd_moe.core.mesh import Axis
from spmd_moe.core.moves import MOVES, Step, letter
from spmd_moe.core.per_rank_work import is_local_tensor, shapes_by_rank
from spmd_moe.core.placement import Kind
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.core.torch_modes import is_unchecked
from spmd_moe.core.validate import describe_value

T = TypeVar("T", bound=Tensor)
# Rows per rank of the sharded dim. A move from one sharded dim to another has two: of the dim that
# becomes whole, and of the dim that is cut. The latter alone may be left out; it is then `even`.
Shape: TypeAlias = ShardShape | tuple[ShardShape, ShardShape]


def redistribute(
    x: Tensor,
    axis: Axis | ProcessGroup,
    *,
    src: Kind,
    dst: Kind,
    shape: Shape | None = None,
    dtype: Dtype = None,
    grad_dtype: Dtype = None,
) -> Tensor:
    """Convert `x` from placement `src` to placement `dst` on one mesh axis.

    The value of the whole tensor does not change. `S(i)` counts the dims of `x` as it is passed.
    `src=R` and `src=I` are trusted: verifying them would need a collective. The result has the
    dtype of `x`. Backward runs the move in the last column of the table in docs/placements.md.

    Args:
        x: The tensor of this rank.
        axis: `mesh[TP]`, or a process group.
        src: The kind of `x` on the axis: `R`, `I`, `P` or `S(i)`.
        dst: The kind of the result.
        shape: Rows of the sharded dim on each rank, if they are not equal. A move from `S(i)` to
            `S(j)` accepts two: of dim `i` before and of dim `j` after. Default: the dim must be
            divisible by the number of ranks.
        dtype: Accumulation dtype of reductions. Default: `x.dtype`.
        grad_dtype: Accumulation dtype of reductions in backward; required for inputs below
            float32 whose backward reduces.

    Returns:
        The tensor of this rank in the new placement. On an axis of one rank, `x` itself.

    Raises:
        PlacementError: There is no such move, for example from or to `V`.
        ShapeError: `shape` contradicts the sizes, or a dim is not divisible.
        DtypeError: `grad_dtype` is required and missing.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from spmd_moe import TP, MoEMesh, R, S, ShardShape, redistribute
        >>> dist.init_process_group("fake", rank=1, world_size=4)
        >>> tp = MoEMesh.init("cpu", tp=4)[TP]
        >>> x = torch.arange(5.0)  # the same on all ranks
        >>> redistribute(x, tp, src=R, dst=S(0), shape=ShardShape.even(5, 4))
        tensor([2., 3.])
    """
    group, ranks = ranks_of("redistribute", axis)
    if ranks == 1 and is_local_tensor(x):
        return x  # rows per rank may be another list on every simulated rank: nothing to plan by
    try:
        if shape is not None or dtype is not None or grad_dtype is not None:
            _check_types(shape, dtype, grad_dtype)
        if ranks == 1 and shape is None:  # most calls: a plan would be half of one
            _check_move(src, dst, x.ndim)
            _check_grad_dtype(x, src, dst, grad_dtype)
            return x  # all kinds are the same thing on one rank
        step = _step_for(x, group, ranks, src, dst, shape)
        _check_grad_dtype(x, step.src, step.dst, grad_dtype)
    except _RefusalError as refused:
        raise refused.error(
            explain(
                "redistribute",
                f"x {describe(x)} on {_axis_name(axis)}: {refused.what}",
                why=refused.why,
                fixes=refused.fixes,
            )
        ) from None
    if ranks == 1:
        return x
    if _same(step.src, step.dst):
        if is_unchecked():
            return x
        kept: Tensor = convert(x, group, src=step.src, dst=step.dst)  # seen by the checker
        return kept
    return move(x, group, step, dtype, grad_dtype)


@lru_cache(maxsize=4096)
def plan(
    src: Kind, dst: Kind, local: tuple[int, ...], rank: int, ranks: int, shape: Shape | None
) -> Step:
    """The step from `src` to `dst` for a tensor that has the shape `local` on `rank` of `ranks`."""
    dims = len(local)
    _check_move(src, dst, dims)
    src, dst = _from_first(src, dims), _from_first(dst, dims)
    before, after = _shapes_of_each_side(src, dst, shape)
    if isinstance(src, Shard):
        before = _shape_before(src, local[src.dim], rank, ranks, before)
    if isinstance(dst, Shard) and not _same(src, dst):
        after = _shape_after(dst, local[dst.dim], ranks, after)
    return Step(src, dst, before, after, told=shape is not None)


def moves_table() -> str:
    """The table of moves in Markdown, as the documentation shows it."""
    lines = ["| from | to | move | forward | each rank sends | backward |", "|" + " --- |" * 6]
    for (src, dst), row in MOVES.items():
        back = Step(_example(src, 0), _example(dst, 1 if src == "S" else 0)).backward()
        kinds = f"{letter(back.src)} to {letter(back.dst)}"
        lines.append(
            f"| {src} | {dst} | {row.name} | {row.does} | {row.costs} | {back.row.name} ({kinds}) |"
        )
    return "\n".join(lines)


def _example(name: str, dim: int) -> Kind:
    return Shard(dim) if name == "S" else PerMeshAxisLocalSpmdType(name)


# --- planning ---------------------------------------------------------------------------------


@final
class _RefusalError(Exception):
    """Why there is no step; `redistribute` knows the tensor and the axis, and tells the user."""

    def __init__(self, error: type[SpmdMoeError], what: str, why: str, fixes: list[str]) -> None:
        self.error, self.what, self.why, self.fixes = error, what, why, fixes


def _step_for(
    x: Tensor, group: ProcessGroup, ranks: int, src: Kind, dst: Kind, shape: Shape | None
) -> Step:
    if is_local_tensor(x):  # one process plans for every rank it simulates
        each = shapes_by_rank(x, group)
        steps = [plan(src, dst, local, rank, ranks, shape) for rank, local in each]
        return steps[0]
    rank = 0 if ranks == 1 else dist.get_rank(group)
    # The compiler sees through the cache, and warns of it.
    planned = plan.__wrapped__ if torch.compiler.is_compiling() else plan
    return planned(src, dst, tuple(x.shape), rank, ranks, shape)


def _same(src: Kind, dst: Kind) -> bool:
    """As `==`; but what compiles with dynamic numbers cannot compare objects by those in them."""
    if isinstance(src, Shard) and isinstance(dst, Shard):
        return src.dim == dst.dim
    return src is dst


def _check_types(shape: object, *dtypes: object) -> None:
    parts = shape if isinstance(shape, tuple) else (shape,)
    if shape is not None and not (parts and all(isinstance(p, ShardShape) for p in parts)):
        raise _RefusalError(
            ShapeError,
            f"shape is {describe_value(shape)}; it must be a ShardShape, or two",
            "it says how many rows of the sharded dim each rank has",
            ["shape=ShardShape.ragged([2, 2, 1, 0])   # rows of each rank"],
        )
    for dtype in dtypes:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise _RefusalError(
                DtypeError,
                f"a dtype is {describe_value(dtype)}; it must be a torch.dtype",
                "names of dtypes are attributes of torch",
                ["torch.float32"],
            )


def _from_first(kind: Kind, dims: int) -> Kind:
    """The kind, its dim counted from the first."""
    return Shard(kind.dim % dims) if isinstance(kind, Shard) else kind


def _check_move(src: Kind, dst: Kind, dims: int) -> None:
    _check_kind(src, dims)
    if src is dst:
        return
    _check_kind(dst, dims)
    if not _same(src, dst) and (letter(src), letter(dst)) not in MOVES:
        raise _no_such_move(src, dst)


def _check_kind(kind: Kind, dims: int) -> None:
    if isinstance(kind, PerMeshAxisLocalSpmdType):
        return
    if not isinstance(kind, Shard):
        raise _RefusalError(
            PlacementError,
            f"{'S without its dim' if kind is Shard else describe_value(kind)} is no kind",
            "the kinds are R, I, V, P and S(dim)",
            ["S(0)" if kind is Shard else "src=R, dst=S(0)"],
        )
    if not -dims <= kind.dim < dims:
        raise _RefusalError(
            ShapeError,
            f"{kind!r} names dim {kind.dim}, but there are {dims} dims",
            "a dim that is not there cannot be sharded",
            [f"S({dim})" for dim in range(dims)],
        )


def _no_such_move(src: Kind, dst: Kind) -> _RefusalError:
    out = {("S(dim)" if d == "S" else d): row for (s, d), row in MOVES.items() if s == letter(src)}
    fixes = [f"dst={d}   # {row.name}: {row.does}; sends {row.costs}" for d, row in out.items()]
    return _RefusalError(
        PlacementError,
        f"no move {src!r} -> {dst!r}; from {src!r} one can go to {', '.join(out) or 'none'}",
        "V does not say how the tensors of the ranks belong together",
        fixes or ["src=S(dim)   # if the tensors of all ranks, joined along dim, are the whole"],
    )


def _shapes_of_each_side(
    src: Kind, dst: Kind, shape: Shape | None
) -> tuple[ShardShape | None, ShardShape | None]:
    """Which side a shape speaks of: the one that is sharded; of two, the one before the move."""
    sharded = isinstance(src, Shard), isinstance(dst, Shard)
    if shape is None:
        return None, None
    if isinstance(shape, tuple):
        if sharded == (True, True) and not _same(src, dst):
            return shape
        what, fix = "two shapes are given, but not two sharded dims", "shape=one_shape"
    elif any(sharded):
        return (shape, None) if sharded[0] else (None, shape)
    else:
        what, fix = "a shape is given, but no dim is sharded", "shape=None"
    raise _RefusalError(
        ShapeError,
        f"{what} in {src!r} -> {dst!r}",
        "a shape is rows per rank of a sharded dim",
        [fix],
    )


def _shape_before(
    src: Shard, rows: int, rank: int, ranks: int, shape: ShardShape | None
) -> ShardShape | None:
    """The rows of every rank before the move; None if they are equal and there are any."""
    if shape is None:
        return ShardShape.even(0, ranks) if rows == 0 else None
    _check_ranks(shape, ranks)
    if shape.sizes[rank] != rows:
        raise _RefusalError(
            ShapeError,
            f"dim {src.dim} has {rows} rows on rank {rank}, but shape says {shape}",
            "all ranks pad and trim by the same shape, so it must be true on each of them",
            ["ShardShape.ragged(sizes)   # with the sizes that the ranks really hold"],
        )
    return None if shape.equal and shape.total else shape


def _shape_after(dst: Shard, total: int, ranks: int, shape: ShardShape | None) -> ShardShape | None:
    """The rows of every rank after the move; None if they are equal and there are any."""
    even = ShardShape.even(total, ranks)
    if shape is None:
        if not even.equal:
            raise _RefusalError(
                ShapeError,
                f"the {total} rows of dim {dst.dim} do not divide by {ranks} ranks",
                "without a shape all ranks get the same number of rows",
                [f"shape=ShardShape.even({total}, {ranks})   # {even}"],
            )
        shape = even
    _check_ranks(shape, ranks)
    if shape.total != total:
        raise _RefusalError(
            ShapeError,
            f"dim {dst.dim} has {total} rows, but shape says {shape}",
            "the rows of all ranks together are the whole",
            [f"shape=ShardShape.even({total}, {ranks})"],
        )
    return None if shape.equal and shape.total else shape


def _check_ranks(shape: ShardShape, ranks: int) -> None:
    if shape.ranks != ranks:
        raise _RefusalError(
            ShapeError,
            f"shape is for {shape.ranks} ranks ({shape})",
            "it gives the rows of every rank of the axis",
            [f"shape=ShardShape.even({shape.total}, {ranks})"],
        )


def _check_grad_dtype(x: Tensor, src: Kind, dst: Kind, grad_dtype: Dtype) -> None:
    """A sum in low precision must be requested, also if only backward computes it."""
    if grad_dtype is not None or not x.requires_grad or x.dtype.itemsize >= 4:
        return
    if _same(src, dst) or not torch.is_grad_enabled():
        return
    step = Step(src, dst)
    if not step.backward().row.sums:
        return
    raise _RefusalError(
        DtypeError,
        f"its gradient would be summed over the ranks in {short_dtype(x.dtype)}",
        f"backward of {step.row.name} is {step.backward().row.name}, in no dtype that is stated",
        ["grad_dtype=torch.float32", f"grad_dtype={x.dtype}   # if the loss of precision is meant"],
    )


def _axis_name(axis: Axis | ProcessGroup) -> str:
    if isinstance(axis, Axis):
        return str(axis)
    return f"group '{axis.group_desc}' ({plural(axis.size(), 'rank')})"
