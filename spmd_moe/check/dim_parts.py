"""Parts of a sharded dim: what `chunk`, `split`, `narrow` and slices make of this rank's shard.

Halves of a shard are not shards of the halves. Parts that are treated alike and put together again
are right; a product of two of them, as of gate and up in a fused weight, is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

from spmd_types import MeshAxis
from torch import Tensor

Dims: TypeAlias = dict[MeshAxis, int]
_PART, _WHOLE = "_spmd_moe_part", "_spmd_moe_divided"
_DIVIDES = {"chunk", "split", "tensor_split", "narrow", "__getitem__"}
_JOINS = {"cat", "concat", "concatenate"}
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_", "maximum", "minimum"}


class Part(NamedTuple):
    """One part of a dim that an axis cuts."""

    of: object  # the same for all parts of one tensor
    axis: MeshAxis
    place: int  # where it begins
    text: str


def part_of(x: Tensor) -> Part | None:
    found: Part | None = vars(x).get(_PART)
    return found


def divide(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor], cut: Dims
) -> Iterator[tuple[Tensor, Dims]]:
    """The sharded dims of each result of an operation that takes parts, which are marked."""
    x: Tensor = args[0]
    if name == "__getitem__":
        found = _indexed(x, args[1])
        if found is None:
            return
        kept, starts = found
        yield results[0], {a: kept[d] for a, d in cut.items() if d in kept}
        for axis, dim in cut.items():
            if dim in starts:
                _mark(x, results[0], axis, dim, starts[dim])
        return
    # narrow(x, dim, start, length), but chunk(x, chunks, dim)
    start = _argument(args, kwargs, 2, "start") if name == "narrow" else 0
    dim = _argument(args, kwargs, 1 if name == "narrow" else 2, "dim") % x.ndim
    begin = start if isinstance(start, int) else 0  # else a tensor says where
    places = itertools.accumulate((y.shape[dim] for y in results), initial=begin)
    for y, place in zip(results, places, strict=False):
        yield y, cut
        for axis, cut_dim in cut.items():
            if cut_dim == dim and y.shape[dim] != x.shape[dim]:
                _mark(x, y, axis, dim, place)


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return kwargs.get(name, args[place] if len(args) > place else 0)


def divides(name: str) -> bool:
    return name in _DIVIDES


def joins(name: str) -> bool:
    return name in _JOINS


def mixed(name: str, operands: Iterable[Tensor]) -> tuple[Part, str] | None:
    """Two parts of one dim that meet in an operation that is no sum over that dim."""
    parts = [part for part in map(part_of, operands) if part is not None]
    for a, b in itertools.pairwise(parts):
        ordered = joins(name) and a.place < b.place
        if a.of is b.of and a.place != b.place and not ordered and name not in _SUMS:
            return a, f"parts of {a.text}, of which this rank has a shard, meet in it"
    return None


def carry(name: str, operands: Sequence[Tensor], y: Tensor, cut: Dims) -> None:
    """A result is the part that its operands are, unless they are several."""
    parts = [part for part in map(part_of, operands) if part is not None]
    if parts and parts[0].axis in cut and all(p.place == parts[0].place for p in parts):
        setattr(y, _PART, parts[0])


def joined(args: Sequence[Any], kwargs: Mapping[str, Any], cut: Dims) -> Dims:
    """Sharded dims of parts that are put together again along the dim that they divide."""
    pieces = [x for x in args[0] if isinstance(x, Tensor)]
    parts = [part_of(x) for x in pieces]
    dim = _argument(args, kwargs, 1, "dim")
    known = parts and all(p is not None and parts[0] and p.of is parts[0].of for p in parts)
    if not known or any(d != dim % pieces[0].ndim for d in cut.values()):
        return {}
    return cut


def _mark(x: Tensor, y: Tensor, axis: MeshAxis, dim: int, place: int) -> None:
    if _WHOLE not in vars(x):
        setattr(x, _WHOLE, object())
    setattr(y, _PART, Part(vars(x)[_WHOLE], axis, place, f"dim {dim} of {list(x.shape)}"))


def _indexed(x: Tensor, index: Any) -> tuple[dict[int, int], dict[int, int]] | None:
    """Where each dim is after basic indexing, and where parts begin; None for an index of data."""
    items = list(index) if isinstance(index, tuple) else [index]
    basic = (int, slice, EllipsisType, type(None))
    if any(isinstance(i, bool) or not isinstance(i, basic) for i in items):
        return None
    named = sum(isinstance(i, int | slice) for i in items)
    at = next((n for n, i in enumerate(items) if i is ...), len(items))
    items[at : at + 1] = [slice(None)] * (x.ndim - named)
    kept, starts, old, new = dict[int, int](), dict[int, int](), 0, 0
    for item in items:
        if isinstance(item, slice):
            kept[old] = new
            start, stop, step = item.indices(x.shape[old])
            if step == 1 and (start, stop) != (0, x.shape[old]):
                starts[old] = start
        new += not isinstance(item, int)
        old += item is not None
    return kept, starts
