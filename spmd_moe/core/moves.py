"""The moves from one kind to another: what each rank does, and the table of all of them.

Every move is linear, and the kinds say what its backward is: where forward takes `src` to `dst`,
backward takes the gradient of `dst` to the gradient of `src`, which is again a move of the table
(R's gradient is P, P's is R, I's is I, S's is S). So backward is looked up, never written, and
second derivatives work. The typing rule for spmd_types' checker stands in the same row.

A shape gives the rows per rank of a sharded dim; None means the same on all ranks. Padding exists
between `_pad` or `_spread` before a collective and the trim after it, and nowhere else.

Functional collectives throughout, so one path serves gloo, NCCL, fake groups, simulated ranks and
torch.compile; a result waits when it is first used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast, final

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from spmd_types import Shard
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _disable_current_modes

from spmd_moe.core.per_rank_work import map_ranks, map_ranks_to_ints
from spmd_moe.core.placement import Kind
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.core.spmd_types_compat import rules

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument
Kernel: TypeAlias = Callable[[Tensor, ProcessGroup, "Step"], Tensor]

# torch 2.12 renamed both; the old names warn from then on.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One move of one tensor on one axis: the kinds, and the rows per rank where it is sharded."""

    src: Kind
    dst: Kind
    src_shape: ShardShape | None = None
    dst_shape: ShardShape | None = None
    told: bool = False  # the caller gave the rows per rank, also where all are equal

    @property
    def src_dim(self) -> int:
        return self.src.dim if isinstance(self.src, Shard) else 0

    @property
    def dst_dim(self) -> int:
        return self.dst.dim if isinstance(self.dst, Shard) else 0

    @property
    def row(self) -> Row:
        return MOVES[letter(self.src), letter(self.dst)]

    def backward(self) -> Step:
        """What the gradient does: from the gradient of `dst` to the gradient of `src`."""
        return Step(
            self.dst.backward_type(),
            self.src.backward_type(),
            self.dst_shape,
            self.src_shape,
            self.told,
        )


def keep(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """Nothing happens to the rows; only the kind, and so the gradient, is another."""
    return x.view_as(x)  # a tensor of its own, since the kind belongs to the tensor


def keep_first(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """Rank 0 keeps the whole and the others zeros, so that the sum over the ranks is the whole."""
    return map_ranks(group, lambda rank, t: torch.zeros_like(t) if rank else t.clone(), x)


def cut_out(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """Every rank keeps its own rows of the whole.

    a b c d e  ==>  a b | c d | e | .        (sizes 2 2 1 0)
    """

    def own(rank: int, t: Tensor) -> Tensor:
        shape = step.dst_shape or ShardShape.even(t.shape[step.dst_dim], group.size())
        part = t.narrow(step.dst_dim, shape.offsets[rank], shape.sizes[rank])
        return part.clone(memory_format=torch.contiguous_format)

    return map_ranks(group, own, x)


def embed(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """Every rank puts its rows where they belong in a whole of zeros; the sum is the whole."""

    def place(rank: int, t: Tensor) -> Tensor:
        rows = t.shape[step.src_dim]
        shape = step.src_shape or ShardShape.even(rows * group.size(), group.size())
        before = shape.offsets[rank]
        return _with_zeros(t, step.src_dim, before, shape.total - before - rows)

    return map_ranks(group, place, x)


def all_reduce(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """Every rank gets the sum over the ranks."""
    return awaitable(funcol.all_reduce(x.contiguous(), "sum", group), "all_reduce")


def all_gather(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """Every rank gets the rows of all ranks, joined in the order of the ranks."""
    dim, shape = step.src_dim, step.src_shape
    if shape is None:
        return awaitable(_all_gather(x.contiguous(), dim, group), "all_gather")
    stacked = awaitable(_all_gather(_pad(x, group, dim, shape), 0, group), "all_gather")
    if dim == 0 and shape.packed:
        return stacked.narrow(0, 0, shape.total)
    parts = stacked.chunk(shape.ranks)
    return torch.cat([p.narrow(dim, 0, n) for p, n in zip(parts, shape.sizes, strict=True)], dim)


def reduce_scatter(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """Every rank gets its own rows of the sum over the ranks."""
    dim, shape = step.dst_dim, step.dst_shape
    if shape is None:
        return awaitable(_reduce_scatter(x.contiguous(), "sum", dim, group), "reduce_scatter")
    padded = awaitable(_reduce_scatter(_spread(x, dim, shape), "sum", dim, group), "reduce_scatter")
    return map_ranks(
        group, lambda rank, t: t.narrow(dim, 0, shape.sizes[rank]).contiguous(), padded
    )


def all_to_all(x: Tensor, group: ProcessGroup, step: Step) -> Tensor:
    """`src_dim` becomes whole while `dst_dim` is cut. Blocks travel flat, so none needs padding."""
    i, j, ranks = step.src_dim, step.dst_dim, range(group.size())

    def block(t: Tensor, source: int, target: int) -> list[int]:
        """The shape of what `source` sends to `target`."""
        shape = list(t.shape)
        shape[i] = step.src_shape.sizes[source] if step.src_shape else t.shape[i]
        cols = step.dst_shape or ShardShape.even(t.shape[j], len(ranks))
        shape[j] = cols.sizes[target]
        return shape

    def flat(me: int, t: Tensor) -> Tensor:
        parts = t.split([block(t, me, r)[j] for r in ranks], j)
        return torch.cat([part.reshape(-1) for part in parts])

    def joined(me: int, received: Tensor, t: Tensor) -> Tensor:
        shapes = [block(t, r, me) for r in ranks]
        parts = received.split([math.prod(shape) for shape in shapes])
        return torch.cat([p.view(s) for p, s in zip(parts, shapes, strict=True)], i)

    sends = map_ranks_to_ints(group, lambda me, t: [math.prod(block(t, me, r)) for r in ranks], x)
    receives = map_ranks_to_ints(
        group, lambda me, t: [math.prod(block(t, r, me)) for r in ranks], x
    )
    sent = map_ranks(group, flat, x)
    received = awaitable(funcol.all_to_all_single(sent, receives, sends, group), "all_to_all")
    return map_ranks(group, joined, received, x)


# --- padding and waiting ----------------------------------------------------------------------


def _pad(x: Tensor, group: ProcessGroup, dim: int, shape: ShardShape) -> Tensor:
    """Rows of zeros behind this rank's own, up to the size of the longest shard."""
    missing = [_travelling(shape) - size for size in shape.sizes]
    return map_ranks(group, lambda rank, t: _with_zeros(t, dim, 0, missing[rank]), x)


def _spread(x: Tensor, dim: int, shape: ShardShape) -> Tensor:
    """A whole with every rank's rows padded in place, as a collective wants them."""
    if shape.packed:
        return _with_zeros(x, dim, 0, _travelling(shape) * shape.ranks - shape.total)
    parts = x.split(shape.sizes, dim)
    rows = _travelling(shape)
    return torch.cat([_with_zeros(p, dim, 0, rows - p.shape[dim]) for p in parts], dim)


def _travelling(shape: ShardShape) -> int:
    """Rows of every rank in a collective: at least one, so that none is left out for want of rows.

    Which collectives run, and in what order, then follows from the configuration alone.
    """
    return max(shape.padded, 1)


def _with_zeros(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    if before == after == 0:
        return x.contiguous()
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [before, after])


@final
class InFlight(funcol.AsyncCollectiveTensor):
    """The result of a running collective. It waits at its first use, or when it is deleted unused.

    torch registers every functional collective and keeps its tensors until `wait_tensor` is called.
    A result that nothing reads would stay registered until the process ends. There are such results
    in `torch.utils.checkpoint`, which stops the second forward after the last saved tensor. Waiting
    at deletion is local and safe, because every rank has already issued the collective.
    """

    __slots__ = ()
    source: InFlight | None = None  # of a view: what it was taken from, kept alive until then
    collective = ""  # its name, for messages about waiting ranks

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch's own subclass, which it extends
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's
        if isinstance(out, funcol.AsyncCollectiveTensor):
            return _view_of(args[0], out)
        if isinstance(out, list | tuple):
            return type(out)(_view_of(args[0], y) for y in out)
        return out

    def wait(self) -> Tensor:
        return cast(Tensor, self.trigger_wait())  # type: ignore[no-untyped-call]  # torch's

    def __del__(self) -> None:
        if self.source is not None:
            self.source.completed |= self.completed
        elif not self.completed and not sys.is_finalizing():
            # No part of the program that a mode records or checks.
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                funcol.wait_tensor(self.elem)


def _view_of(source: InFlight, view: Any) -> Any:
    if not isinstance(view, funcol.AsyncCollectiveTensor):
        return view
    out = InFlight(view.elem)
    out.source, out.collective = source, source.collective
    return out


def awaitable(result: Tensor, collective: str) -> Tensor:
    """Make a result wait at its first use; wait at once in a simulation, which cannot defer it."""
    if not isinstance(result, funcol.AsyncCollectiveTensor):
        return result
    if type(result.elem) is not Tensor:
        return result.wait()
    out = InFlight(result.elem)
    out.collective = collective
    return cast(Tensor, out)


def wait_for(result: T) -> T:
    """Wait for a result, also one that is never read: torch keeps those in its registry.

    And a gradient may become a `.grad`, which optimizers read past torch's own dispatcher, where a
    waiting tensor would wait: a sum, a view or a copy hands its gradient on as it is.
    """
    if not isinstance(result, funcol.AsyncCollectiveTensor):
        return result
    there = result.clone() if result.requires_grad else result.wait()  # wait() drops the graph
    return cast(T, there)


# --- the table --------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One move: its name, how to run and to type it, and what it does and costs, in words."""

    run: Kernel
    rule: Callable[..., object]
    does: str
    costs: str

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def sums(self) -> bool:
        return self.run in (all_reduce, reduce_scatter)


def letter(kind: Kind) -> str:
    """R, I, V, P, or S for any dim: the key of the table."""
    return "S" if isinstance(kind, Shard) else kind.value


_FREE = "nothing"
_WHOLE, _TWICE = "(n-1)/n of the whole", "2(n-1)/n of the whole"

# What each costs is what one of n ranks sends.
MOVES: dict[tuple[str, str], Row] = {
    ("R", "I"): Row(keep, rules.convert, "the same on all ranks, to be used alike", _FREE),
    ("R", "P"): Row(keep_first, rules.convert, "rank 0 keeps it, the others hold zeros", _FREE),
    ("R", "S"): Row(cut_out, rules.convert, "each rank keeps its rows", _FREE),
    ("I", "R"): Row(keep, rules.convert, "the same on all ranks, to be used differently", _FREE),
    ("I", "P"): Row(keep_first, rules.convert, "rank 0 keeps it, the others hold zeros", _FREE),
    ("I", "S"): Row(cut_out, rules.convert, "each rank keeps its rows", _FREE),
    ("P", "R"): Row(all_reduce, rules.all_reduce, "sum over the ranks", _TWICE),
    ("P", "I"): Row(all_reduce, rules.all_reduce, "sum over the ranks", _TWICE),
    ("P", "S"): Row(
        reduce_scatter, rules.reduce_scatter, "sum, of which each keeps its rows", _WHOLE
    ),
    ("S", "R"): Row(all_gather, rules.all_gather, "join the rows of all ranks", _WHOLE),
    ("S", "I"): Row(all_gather, rules.all_gather, "join the rows of all ranks", _WHOLE),
    ("S", "P"): Row(embed, rules.convert, "own rows in a whole of zeros", _FREE),
    ("S", "S"): Row(
        all_to_all,
        rules.all_to_all,
        "join along one dim, cut along another",
        "(n-1)/n of the shard",
    ),
}
