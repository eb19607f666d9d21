"""Labels of the dims of a product: which dims of its operands meet, and where they end up.

`linear`, the matmuls and `einsum` are one operation with different labels: a label in two operands
is one dim of both, a label that the result does not have is summed over.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Labels: TypeAlias = Sequence[Hashable]


class Product(NamedTuple):
    """A product: its operands, the labels of the dims of each, and those of the result."""

    operands: tuple[Tensor, ...]
    labels: tuple[Labels, ...]
    out: Labels


_MATMULS = {"matmul", "__matmul__", "bmm", "mm", "mv", "dot"}
ELEMENTWISE = {"add", "sub", "mul", "div", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
    "__rmul__", "__truediv__", "where", "masked_fill", "__iadd__", "__isub__", "__imul__", "add_",
    "mul_", "sub_", "div_", "maximum", "minimum"}  # fmt: skip


def product_of(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor
) -> Product | None:
    """An operation as a product, or None if it is none whose dims are known."""
    tensors = tuple(x for x in args if isinstance(x, Tensor))
    if name == "einsum":
        return _einsum(args)
    if name in ELEMENTWISE and len(tensors) > 1:
        places = tuple(tuple(range(y.ndim - x.ndim, y.ndim)) for x in tensors)
        return Product(tensors, places, tuple(range(y.ndim)))
    if len(tensors) < 2:
        return None
    x, w = tensors[:2]
    if name == "linear":
        rows = tuple(range(x.ndim - 1))
        features: Labels = ("feature", "sum") if w.ndim > 1 else ("sum",)
        return Product((x, w), ((*rows, "sum"), features), (*rows, *features[:-1]))
    if name in _MATMULS and x.ndim and w.ndim:
        return _matmul(x, w)
    return None


def _matmul(x: Tensor, w: Tensor) -> Product:
    """Batches are aligned at the right, as in broadcasting."""
    many = max(x.ndim, w.ndim) - 2
    left, right = range(many - (x.ndim - 2), many), range(many - (w.ndim - 2), many)
    of_x: Labels = (*left, "row", "sum") if x.ndim > 1 else ("sum",)
    of_w: Labels = (*right, "sum", "feature") if w.ndim > 1 else ("sum",)
    own = [label for label in ("row", "feature") if label in (*of_x, *of_w)]
    return Product((x, w), (of_x, of_w), (*range(many), *own))


def _einsum(args: Sequence[Any]) -> Product | None:
    if not args or not isinstance(args[0], str) or "." in args[0]:
        return None
    given = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    inside, arrow, out = args[0].replace(" ", "").partition("->")
    labels = tuple(inside.split(","))
    if not arrow:
        out = "".join(sorted(c for c in set(inside) - {","} if inside.count(c) == 1))
    return Product(tuple(given), labels, out)
