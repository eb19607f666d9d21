"""What each rank holds of a tensor, as the indices of its elements in the whole.

Read from the tensor where it says so: a DTensor by its placements, of any kind; then words
of the target; declarations (class annotations, `declare_placements`); spmd_types' types; and last
from shapes, where they allow one reading only. What they do not decide is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from spmd_moe.check.parity.axis_groups import Axes, Groups, groups_along
from spmd_moe.check.parity.placement_words import Cut, Lies
from spmd_moe.check.target import CannotCheckError, cannot
from spmd_moe.core.errors import short_dtype

Shape: TypeAlias = tuple[int, ...]


class AmbiguousError(CannotCheckError):
    """Shapes that allow several readings; smaller layouts may decide."""


@final
@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of a whole; `index` is None where it is all of it."""

    index: Tensor | None = None
    sums: tuple[Groups, ...] = ()  # what ranks hold are parts of a sum over these
    averages: tuple[Groups, ...] = ()  # .. of a mean
    own: tuple[str, ...] = ()  # R on these axes
    lies: Lies = field(default_factory=Lies)
    read: str = "whole"  # from what

    def of(self, whole: Tensor) -> Tensor:
        return whole if self.index is None else whole.reshape(-1)[self.index]


def composed(outer: Part, inner: Part) -> Part:
    """A part of a part: a DTensor on some axes of what other axes have cut before."""
    if outer.index is None:
        return Part(inner.index, inner.sums, inner.averages, outer.own, outer.lies, inner.read)
    return Part(
        inner.of(outer.index),
        (*outer.sums, *inner.sums),
        inner.averages,
        outer.own,
        outer.lies,
        inner.read,
    )


def axes_beside(x: DTensor, axes: Axes) -> list[str]:
    """The axes of which a DTensor says nothing, because its mesh lacks them."""
    own = {groups_along(x.device_mesh, dim) for dim in range(x.device_mesh.ndim)}
    return [name for name in axes.groups if axes.groups[name] not in own]


def of_dtensor(x: DTensor) -> Part:
    """By its placements: a tensor of indices is distributed as it is. Strided shards included."""
    mesh = x.device_mesh
    kinds = [Replicate() if isinstance(p, Partial) else p for p in x.placements]
    partial = [(d, p) for d, p in enumerate(x.placements) if isinstance(p, Partial)]
    numbers = torch.arange(x.numel()).view(x.shape)
    index = None
    if not all(isinstance(kind, Replicate) for kind in kinds):
        index = distribute_tensor(numbers, mesh, kinds, src_data_rank=None).to_local()
    return Part(
        index,
        tuple(groups_along(mesh, d) for d, p in partial if p.reduce_op == "sum"),
        tuple(groups_along(mesh, d) for d, p in partial if p.reduce_op == "avg"),
        read="DTensor",
    )


def of_words(
    shape: Shape, how: Lies, rank: int, axes: Axes, shapes: Sequence[Shape] | None, what: str
) -> Part:
    """As words or a declaration say; in the sizes that the ranks have, or in even chunks."""
    sums = tuple(axes.groups[axis] for axis in how.sums)
    index = index_of(shape, how.cuts, rank, axes, shapes, what)
    return Part(index, sums, own=how.own, lies=how, read="words")


def index_of(
    shape: Shape,
    cuts: Sequence[Cut],
    rank: int,
    axes: Axes,
    shapes: Sequence[Shape] | None,
    what: str,
) -> Tensor | None:
    """Of each element of this rank: its number in the whole."""
    cuts = [cut for cut in cuts if axes.size(cut.axis) > 1]
    if not cuts:
        return None
    total = 1
    for size in shape:
        total *= size
    index = torch.arange(total).view(shape)
    for dim in dict.fromkeys(cut.dim for cut in cuts):
        if not -len(shape) <= dim < len(shape):
            why = "a tensor is sharded along a dim that it has"
            raise cannot(what, f"it has shape {list(shape)}, and no dim {dim}", why, '"tp 0"')
        mine = [cut for cut in cuts if cut.dim == dim]
        blocks = mine[0].blocks
        sizes = None if shapes is None else [s[dim] // blocks for s in shapes]
        pieces = index.chunk(blocks, dim) if blocks > 1 else (index,)
        index = torch.cat([_cut(piece, mine, rank, axes, sizes, what) for piece in pieces], dim)
    return index


def _cut(
    index: Tensor,
    cuts: Sequence[Cut],
    rank: int,
    axes: Axes,
    sizes: Sequence[int] | None,
    what: str,
) -> Tensor:
    """This rank's piece along one dim."""
    dim, names = cuts[0].dim, [cut.axis for cut in cuts]
    if sizes is None:
        for name in names:
            each = -(-index.shape[dim] // axes.size(name))
            begin = min(each * axes.coordinate(name, rank), index.shape[dim])
            index = index.narrow(dim, begin, min(each, index.shape[dim] - begin))
        return index
    there = {tuple(axes.coordinate(n, r) for n in names): r for r in axes.joined(names, rank)}
    place = tuple(axes.coordinate(name, rank) for name in names)
    before = sum(sizes[r] for key, r in there.items() if key < place)
    total = sum(sizes[r] for r in there.values())
    if total != index.shape[dim]:
        have = [sizes[r] for _, r in sorted(there.items())]
        over, dims = " and ".join(names), f"{index.shape[dim]} on dim {dim}"
        why = "the ranks' parts together make up the whole"
        raise cannot(what, f"sharded over {over} its ranks have {have}, of {dims}", why)
    return index.narrow(dim, before, sizes[rank])


# --- from shapes --------------------------------------------------------------------------------


def by_shape(
    what: str,
    dtype: torch.dtype,
    shape: Shape,
    shapes: Sequence[Shape],
    axes: Axes,
    among: Iterable[str] | None = None,
    fix: str = "weights={{{what!r}: {words!r}}}",
) -> Lies:
    """The one way in which parts of these shapes make up a whole of that shape; else a question."""
    if all(s == shape for s in shapes):
        return Lies()
    names = [n for n in axes.wide() if among is None or n in among] or axes.wide()
    if any(len(s) != len(shape) for s in shapes):
        raise _question(what, dtype, shape, shapes, [], fix)
    dims = [d for d in range(len(shape)) if any(s[d] != shape[d] for s in shapes)]
    ways = [_ways(d, shape, shapes, axes, names) for d in dims]
    every = [sum(way, ()) for way in itertools.product(*ways)]
    found = [cuts for cuts in every if len({c.axis for c in cuts}) == len(cuts)]
    fewest = min(map(len, found), default=0)
    found = [cuts for cuts in found if len(cuts) == fewest]
    if len(found) == 1:
        return Lies(found[0])
    raise _question(what, dtype, shape, shapes, found, fix)


def _ways(
    dim: int, shape: Shape, shapes: Sequence[Shape], axes: Axes, names: Sequence[str]
) -> list[tuple[Cut, ...]]:
    """Axes over which the ranks' sizes along a dim add up to the whole."""
    orders = (order for n in (1, 2, 3) for order in itertools.permutations(names, n))
    found: list[tuple[Cut, ...]] = []
    for order in orders:
        if found and len(found[0]) < len(order):
            break
        if all(_adds_up(dim, shape, shapes, axes, order, rank) for rank in range(axes.world)):
            if len(order) > 1 and list(order) != [n for n in names if n in order]:
                continue  # the order of the mesh
            found.append(tuple(Cut(name, dim) for name in order))
    return found


def _adds_up(
    dim: int, shape: Shape, shapes: Sequence[Shape], axes: Axes, order: Sequence[str], rank: int
) -> bool:
    reached = axes.joined(order, rank)
    places = {tuple(axes.coordinate(name, r) for name in order) for r in reached}
    return len(places) == len(reached) and sum(shapes[r][dim] for r in reached) == shape[dim]


def _question(
    what: str,
    dtype: torch.dtype,
    shape: Shape,
    shapes: Sequence[Shape],
    found: Sequence[tuple[Cut, ...]],
    fix: str,
) -> CannotCheckError:
    have = " or ".join(str(list(s)) for s in dict.fromkeys(shapes))
    choices = [str(Lies(cuts)) for cuts in found]
    which = f": sharded as {' or as '.join(map(repr, choices))}?" if choices else ""
    said = (
        f"ranks have {have} of {short_dtype(dtype)}{list(shape)}{which or ', sharded over what?'}"
    )
    why = "the shapes allow more than one reading" if choices else "the shapes allow no reading"
    fixes = [fix.format(what=what, words=words) for words in choices or ["tp 0"]]
    text = str(cannot(f"TARGET, {what}", said.rstrip("?"), why, *fixes[:4]))
    return AmbiguousError(text) if choices else CannotCheckError(text)


def whole_of(x: Tensor) -> Tensor:
    """A tensor of one process, which may be a DTensor of one rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_of(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
