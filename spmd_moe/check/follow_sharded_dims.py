"""Sharded dims, followed from the cut to the operations where they matter (X7).

To the local types a shard is V: rows of different things. Code between two placements may still
rely on which dim was cut. A view that mixes that dim with others, or a softmax along it, computes
something else on every rank than it would on the whole (X7). Where a signature says V, or an
operation is not known here, following ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spmd_types import MeshAxis, Shard
from torch import Tensor

Dims = dict[MeshAxis, int]
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
    """What has as many rows as something with a given number of them has a given number, too.

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


def follow(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor]
) -> str:
    """Mark the results of an operation; why it must not be done to such a shard, or ''."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if not any(cut_dims(x) for x in tensors) or not results or not isinstance(args[0], Tensor):
        return ""
    x, y = args[0], results[0]
    if name in _ALONG:
        return _along(x, _dim(args, kwargs, _ALONG[name]), results)
    if name in _VIEWS:
        return _view(x, y)
    if name in _PRODUCTS and len(tensors) > 1:
        mark(y, _product(tensors[0], tensors[1], y, _PRODUCTS[name]))
    elif name in _SWAPS:
        mark(y, _swapped(name, x, args, kwargs))
    elif name in _PICKS:
        for part in results:
            mark(part, _picked(x, _dim(args, kwargs, 1, 0), x.ndim - part.ndim))
    elif name in _ELEMENTWISE:
        mark(y, {a: d for t in tensors for a, d in _broadcast(t, y).items()})
    return ""


def moved(x: Tensor, y: Tensor, axis: MeshAxis, dst: object) -> None:
    """`y` is `x` after a move on `axis`."""
    dims = {a: d for a, d in cut_dims(x).items() if a != axis}
    if isinstance(dst, Shard):
        dims[axis] = dst.dim % y.ndim
    mark(y, dims)


# Operations along a dim, and where in their arguments the dim stands.
_ALONG = {"softmax": 1, "log_softmax": 1, "logsumexp": 1, "argmax": 1, "argmin": 1, "topk": 2,
          "softmin": 1, "normalize": 2, "layer_norm": -1, "rms_norm": -1}  # fmt: skip
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
    "unsqueeze",
    "squeeze",
}
_PRODUCTS = {
    "linear": "td,fd",
    "matmul": "td,df",
    "__matmul__": "td,df",
    "bmm": "td,df",
    "mm": "td,df",
}
_OTHER_ROWS = {"einsum", "transpose", "permute", "t", "T", "mT", "swapaxes", "movedim", "bincount"}
_OVER_A_DIM = {"sum", "mean", "prod", "amax", "amin"}
_SWAPS = {"transpose", "permute", "t", "T", "mT", "swapaxes"}
_PICKS = {"select", "unbind", "__iter__"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
    "__rmul__", "__truediv__", "neg", "exp", "log", "sigmoid", "silu", "relu", "gelu", "tanh",
    "softplus", "sqrt", "square", "clamp", "to", "float", "double", "half", "bfloat16", "type",
    "contiguous", "clone", "where", "masked_fill", "requires_grad_", "dropout"}  # fmt: skip


def _dim(
    args: Sequence[Any], kwargs: Mapping[str, Any], place: int, default: int = -1
) -> int | None:
    found = kwargs.get("dim", args[place] if 0 < place < len(args) else default)
    return found if isinstance(found, int) else None


def _along(x: Tensor, dim: int | None, results: Sequence[Tensor]) -> str:
    dims = cut_dims(x)
    if dim is not None and dim % max(x.ndim, 1) in dims.values() and x.numel():
        return f"it runs along dim {dim % x.ndim}, of which this rank has a part"
    for y in results:
        mark(y, {a: d for a, d in dims.items() if d < y.ndim} if y.ndim == x.ndim else {})
    return ""


def _view(x: Tensor, y: Tensor) -> str:
    """Dims of a view are those of the tensor in groups of equal size; a shard must lead its group.

    [T, B, D] as [T*B, D]: a shard of T is one of T*B. A shard of B would be rows from everywhere.
    """
    kept: Dims = {}
    for axis, dim in cut_dims(x).items():
        if x.numel() == 0 or x.shape[dim] == 1:
            continue  # too few to tell, and some other number of tokens will
        for ins, outs in _groups(tuple(x.shape), tuple(y.shape)):
            if dim in ins and dim == ins[0]:
                kept[axis] = outs[0]
            elif dim in ins:
                shape = list(y.shape)
                return f"to {shape} it mixes dim {dim}, of which this rank has a part, with others"
    mark(y, kept)
    return ""


def _groups(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
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


def _product(x: Tensor, w: Tensor, y: Tensor, how: str) -> Dims:
    """The leading dims of the left side, and the last of what the right side gives."""
    dims = {a: d for a, d in cut_dims(x).items() if d < x.ndim - 1 and x.ndim == y.ndim}
    last = 0 if how == "td,fd" else w.ndim - 1
    return dims | {a: y.ndim - 1 for a, d in cut_dims(w).items() if d == last and w.ndim > 1}


def _swapped(name: str, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dims:
    order = list(range(x.ndim))
    if name == "permute":
        order = [d % x.ndim for d in (args[1] if isinstance(args[1], tuple | list) else args[1:])]
    elif x.ndim > 1:
        given = [*args[1:], *kwargs.values()]
        i, j = given[:2] if len(given) > 1 else (-2, -1)
        order[i], order[j] = order[j], order[i]
    return {a: order.index(d) for a, d in cut_dims(x).items()}


def _picked(x: Tensor, dim: int | None, fewer: int) -> Dims:
    if dim is None or fewer != 1:
        return {}
    dim %= x.ndim
    return {a: d - (d > dim) for a, d in cut_dims(x).items() if d != dim}


def _broadcast(x: Tensor, y: Tensor) -> Dims:
    shift = y.ndim - x.ndim
    return {a: d + shift for a, d in cut_dims(x).items() if x.shape[d] == y.shape[d + shift]}
