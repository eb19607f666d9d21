"""Sharded dims, followed from the cut to the operations where they matter (X7).

To the local types a shard is V: rows of different things. Code between two placements may still
rely on which dim was cut. A view that mixes that dim with others, a softmax along it, or a product
in which the axis cuts another dim too, computes something else on every rank than on the whole
(X7). Where a signature says V, or an operation is not known here, following ends.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from spmd_types import MeshAxis, Shard, V, get_local_type
from torch import Tensor

from spmd_moe.check import dim_parts
from spmd_moe.check.dim_labels import ELEMENTWISE, Product, product_of
from spmd_moe.check.dim_parts import Dims
from spmd_moe.core.errors import describe

_ATTRIBUTE = "_spmd_moe_shards"


def cut_dims(x: Tensor) -> Dims:
    dims: Dims = vars(x).get(_ATTRIBUTE, {})
    return dims


def mark(x: Tensor, dims: Mapping[MeshAxis, int]) -> None:
    if dims or cut_dims(x):
        setattr(x, _ATTRIBUTE, dict(dims))


# --- what the module is given -----------------------------------------------------------------

_GIVEN, _ROWS = "_spmd_moe_given", "_spmd_moe_rows"


def give(x: Tensor) -> None:
    """It comes from outside, and so does the number of its rows."""
    setattr(x, _GIVEN, True)
    setattr(x, _ROWS, True)


def is_given(x: Tensor) -> bool:
    return _GIVEN in vars(x)


def rows_are_given(x: Tensor) -> bool:
    return _ROWS in vars(x)


def keep_rows(
    name: str, args: Sequence[Any], operands: Iterable[Tensor], results: Iterable[Tensor]
) -> None:
    """Mark results with as many rows as an operand whose number of rows is given.

    Not after an operation that sums over the rows, or puts another dim first: there may be as many
    experts as tokens.
    """
    if name in _OTHER_ROWS or (name in _OVER_A_DIM and _dim(args, {}, 1, 0) in (0, None)):
        return
    known = {x.shape[0] for x in operands if rows_are_given(x) and x.ndim}
    for y in results if known else ():
        if y.ndim and y.shape[0] in known:
            setattr(y, _ROWS, True)


# --- dims ---------------------------------------------------------------------------------------


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class Misuse(NamedTuple):
    """Why an operation must not be done to such a shard, and on which axis."""

    axis: MeshAxis
    why: str  # {axis} stands for its name
    fixes: tuple[str, ...]


def _on_whole(dim: int) -> tuple[str, str]:
    return (
        f"redistribute(x, {{axis}}, src=S({dim}), dst=R)   # before it",
        "redistribute(x, {axis}, src=..., dst=S(0), shape=...)   # after it",
    )


_UNFUSED = (
    "two weights, each sharded along its features   # in place of a fused one",
    "h[..., ::2], h[..., 1::2]   # if the weight has the rows of both in turns",
)


def follow(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
    whole: Shapes | None = None,
    received: bool = False,
) -> Misuse | None:
    """Mark the results of an operation, or return its misuse of a sharded dim.

    `whole` are the shapes of the first operand and result in one process, where they are known.
    `received` says that the first operand was made of what a collective returned.
    """
    product = product_of(name, args, kwargs, results[0]) if results else None
    joins = dim_parts.joins(name) and args and isinstance(args[0], list | tuple)
    given = product.operands if product else args[0] if joins else args
    tensors = [x for x in given if isinstance(x, Tensor)]
    if not any(cut_dims(x) for x in tensors) or not results:
        return None
    met = dim_parts.mixed(name, tensors)
    if met is not None:
        return Misuse(met[0].axis, met[1], _UNFUSED)
    if product is not None:
        found = _product(product, results[0], received)
    else:
        found = _follow(name, args, kwargs, results, whole)
    for y in results if not dim_parts.divides(name) and not joins else ():
        dim_parts.carry(name, tensors, y, cut_dims(y))
    return found


def _follow(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
    whole: Shapes | None,
) -> Misuse | None:
    if dim_parts.joins(name):
        mark(results[0], dim_parts.joined(args, kwargs, cut_dims(args[0][0])))
    if not isinstance(args[0], Tensor):
        return None
    x, y = args[0], results[0]
    if name in _ALONG:
        return _along(x, _dim(args, kwargs, _ALONG[name]), results)
    if name in _VIEWS:
        return _view(x, y, _merged(name, x, y, args, kwargs), whole)
    if dim_parts.divides(name):
        for part, dims in dim_parts.divide(name, args, kwargs, results, cut_dims(x)):
            mark(part, dims)
    elif name in _SWAPS:
        mark(y, _swapped(name, x, args, kwargs))
    elif name in _PICKS:
        for part in results:
            mark(part, _picked(x, _dim(args, kwargs, 1, 0), x.ndim - part.ndim))
    elif name in _OVER_A_DIM:
        mark(y, _reduced(x, y, _dim(args, kwargs, 1, 10**9)))
    elif name in _OF_ONE and x.shape == y.shape:
        mark(y, cut_dims(x))
    return None


def moved(x: Tensor, y: Tensor, axis: MeshAxis, dst: object) -> None:
    """`y` is `x` after a move on `axis`."""
    dims = {a: d for a, d in cut_dims(x).items() if a != axis}
    if isinstance(dst, Shard):
        dims[axis] = dst.dim % y.ndim
    mark(y, dims)


# Operations along a dim, and where in their arguments the dim stands.
_ALONG = {"softmax": 1, "log_softmax": 1, "logsumexp": 1, "argmax": 1, "argmin": 1, "topk": 2,
          "softmin": 1, "normalize": 2, "layer_norm": -1, "rms_norm": -1, "glu": 1}  # fmt: skip
_VIEWS = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "unsqueeze",
          "squeeze"}  # fmt: skip
_OTHER_ROWS = {"einsum", "transpose", "permute", "t", "T", "mT", "swapaxes", "movedim", "bincount"}
_OVER_A_DIM = {"sum", "mean", "prod", "amax", "amin"}
_SWAPS = {"transpose", "permute", "t", "T", "mT", "swapaxes"}
_PICKS = {"select", "unbind", "__iter__"}
# Of one tensor, or of one and numbers.
_OF_ONE = ELEMENTWISE | {"neg", "__neg__", "exp", "log", "sigmoid", "silu", "relu", "gelu", "tanh",
    "softplus", "sqrt", "square", "clamp", "to", "float", "double", "half", "bfloat16", "type",
    "contiguous", "clone", "requires_grad_", "dropout", "pow", "__pow__"}  # fmt: skip


def _dim(
    args: Sequence[Any], kwargs: Mapping[str, Any], place: int, default: int = -1
) -> int | None:
    found = kwargs.get("dim", args[place] if 0 < place < len(args) else default)
    return found if isinstance(found, int) else None


def _along(x: Tensor, dim: int | None, results: Sequence[Tensor]) -> Misuse | None:
    dims = cut_dims(x)
    for axis, cut in dims.items():
        if dim is not None and dim % max(x.ndim, 1) == cut and x.numel():
            why = f"it runs along dim {cut}, of which this rank has a part"
            return Misuse(axis, why, _on_whole(cut))
    for y in results:
        mark(y, {a: d for a, d in dims.items() if d < y.ndim} if y.ndim == x.ndim else {})
    return None


# --- views --------------------------------------------------------------------------------------

Groups = list[tuple[list[int], list[int]]]
_EXACT = {"unsqueeze", "flatten"}  # for any sizes; `unflatten` names dims, and a size of one


def _view(x: Tensor, y: Tensor, exact: Groups | None, whole: Shapes | None) -> Misuse | None:
    """Dims of a view are those of the tensor in groups of equal size; a shard must lead its group.

    [T, B, D] as [T*B, D]: a shard of T is one of T*B. A shard of B would be rows from everywhere.
    """
    kept: Dims = {}
    before, after = _same_view(x, y, whole) or (tuple(x.shape), tuple(y.shape))
    told = exact is not None or before != x.shape
    for axis, dim in cut_dims(x).items():
        if not told and (x.numel() == 0 or _has_one(x, y)):
            continue  # these shapes do not tell; those of the whole will
        for ins, outs in exact or dim_groups(before, after):
            if dim not in ins:
                continue
            leads = all(d == dim or before[d] == 1 for d in ins[: ins.index(dim) + 1])
            if not leads and x.numel():
                why = f"to {list(y.shape)} it mixes dim {dim}, of which this rank has a part"
                return Misuse(axis, f"{why}, with others", _on_whole(dim))
            if told and _taken_for_whole(outs, after, y):
                why = f"{y.shape[outs[0]]} is the size of a whole dim, and dim {dim} is cut"
                return Misuse(axis, why, _on_whole(dim))
            kept[axis] = outs[0]
    mark(y, kept)
    return None


def _taken_for_whole(outs: Sequence[int], after: Sequence[int], y: Tensor) -> bool:
    """The first dim of a cut group is as large as in one process, and a later one is smaller."""
    smaller = [d for d in outs if y.shape[d] < after[d]]
    return bool(smaller) and y.shape[outs[0]] == after[outs[0]]


def _has_one(x: Tensor, y: Tensor) -> bool:
    return any(x.shape[d] == 1 for d in cut_dims(x).values()) or (y.ndim > x.ndim and 1 in y.shape)


def _same_view(x: Tensor, y: Tensor, whole: Shapes | None) -> Shapes | None:
    """The shapes in one process, if only the sharded dims of the operand are larger there."""
    if whole is None or len(whole[0]) != x.ndim or len(whole[1]) != y.ndim or 0 in whole[0]:
        return None
    cut = cut_dims(x).values()
    sizes = enumerate(zip(whole[0], x.shape, strict=True))
    return whole if all(n > own if d in cut else n == own for d, (n, own) in sizes) else None


def asks_for_whole(name: str, x: Tensor, y: Tensor) -> bool:
    """Whether the shapes of a view of a shard do not tell if it is right."""
    if name not in _VIEWS or name in _EXACT or not cut_dims(x) or not x.numel():
        return False
    return y.ndim > x.ndim or _has_one(x, y)


def _merged(
    name: str, x: Tensor, y: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Groups | None:
    """The groups of a view that names dims, for any sizes; None for one that names sizes."""
    rest = [*args[1:], *kwargs.values()]
    if name == "unsqueeze":
        new = rest[0] % (x.ndim + 1)
        return [([d], [d + (d >= new)]) for d in range(x.ndim)]
    if name == "unflatten":
        dim, more = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.ndim, y.ndim - x.ndim
        return [([d], [d + (d > dim) * more]) for d in range(x.ndim) if d != dim] + [
            ([dim], list(range(dim, dim + more + 1)))
        ]
    if name == "flatten" and x.ndim:
        first = kwargs.get("start_dim", args[1] if len(args) > 1 else 0) % x.ndim
        last = kwargs.get("end_dim", args[2] if len(args) > 2 else -1) % x.ndim
        inside = (list(range(first, last + 1)), [first])
        alone = [([d], [d - (d > last) * (last - first)]) for d in range(x.ndim)]
        return [g for g in alone if not first <= g[0][0] <= last] + [inside]
    return None


def dim_groups(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dims, without those of size 1, that have as many elements."""
    left = [d for d, n in enumerate(a) if n != 1]
    right = [d for d, n in enumerate(b) if n != 1]
    found = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(a[d] for d in ins)) != (n := math.prod(b[d] for d in outs)):
            if m < n:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        found.append((ins, outs))
    return found


# --- products and others ------------------------------------------------------------------------

_ALL_ROWS = (
    "redistribute(x, {axis}, src=S(0), dst=R)   # all rows, before they meet features",
    "# spmd: allow shard - <reason>   # where a rank needs its own block, as in ring attention",
)


def _product(product: Product, y: Tensor, received: bool) -> Misuse | None:
    """An axis must cut one label of a product: two would give each rank a block of the result."""
    cut: dict[MeshAxis, dict[Hashable, str]] = {}
    for x, labels in zip(product.operands, product.labels, strict=True):
        for axis, dim in cut_dims(x).items():
            place = product.out.index(labels[dim]) if labels[dim] in product.out else None
            if place is None or x.shape[dim] == y.shape[place]:  # else it is broadcast
                cut.setdefault(axis, {})[labels[dim]] = f"dim {dim} of {describe(x)}"
    for axis, of_label in cut.items():
        if len(of_label) > 1:
            what = f"{{axis}} cuts {' and '.join(of_label.values())}, which are different dims here"
            return Misuse(axis, what, _ALL_ROWS)
        if not received and _rows_by_features(product, axis, next(iter(of_label))):
            rows, features = map(describe, product.operands)
            what = f"over {{axis}}, ranks have different rows of {rows}, and features of {features}"
            return Misuse(axis, what, _ALL_ROWS)
    places = {label: place for place, label in enumerate(product.out)}
    mark(y, {a: places[label] for a, found in cut.items() for label in found if label in places})
    return None


def _rows_by_features(product: Product, axis: MeshAxis, cut: Hashable) -> bool:
    """Rows that differ between the ranks, by a matrix of which each has other features.

    Rows that were received may belong to these features: to the expert of this rank, or to the
    queries of this rank where keys go around in a ring.
    """
    if cut != "feature" or len(product.operands) != 2:
        return False
    x, w = product.operands
    return w.ndim == 2 and axis not in cut_dims(x) and get_local_type(x).get(axis) is V


def _swapped(name: str, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dims:
    order = list(range(x.ndim))
    if name == "permute":
        order = [d % x.ndim for d in (args[1] if isinstance(args[1], tuple | list) else args[1:])]
    elif x.ndim > 1:
        given = [*args[1:], *kwargs.values()]
        i, j = given[:2] if len(given) > 1 else (-2, -1)
        order[i], order[j] = order[j], order[i]
    return {a: order.index(d) for a, d in cut_dims(x).items()}


def _reduced(x: Tensor, y: Tensor, dim: int | None) -> Dims:
    if dim is None or dim >= x.ndim:
        return {}
    return (
        _picked(x, dim, 1)
        if y.ndim < x.ndim
        else {a: d for a, d in cut_dims(x).items() if d != dim % x.ndim}
    )


def _picked(x: Tensor, dim: int | None, fewer: int) -> Dims:
    if dim is None or fewer != 1:
        return {}
    dim %= x.ndim
    return {a: d - (d > dim) for a, d in cut_dims(x).items() if d != dim}
