"""Rows that are copies of other rows: copy each original, and add the copies of each original.

Each is the backward of the other. The sum is one segmented reduction over an index: it is taken in
float32 or wider, in a fixed order, without atomics, and no reordered rows are stored.

    original_R = 0 1 0 2 1           row 0 is a copy of original 0, row 1 of original 1, ...
    row_R      = 0 2 | 1 4 | 3       the rows of original 0, of original 1, of original 2
    start_M    = 0 2 4
"""

# Shape letters in this file:
#   M  originals    R  their copies    D  model width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from spmd_moe.core.autograd_function import apply
from spmd_moe.core.compute_dtype import as_dtype
from spmd_moe.core.spmd_types_compat import rules
from spmd_moe.layer.permute import sum_bags

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument


@final
@dataclass(frozen=True, slots=True)
class Copies:
    """The original of each row. It has the placement of the ids from which it was made."""

    original_R: Tensor  # the original of each row
    row_R: Tensor  # the rows, sorted by original
    start_M: Tensor  # where the rows of each original begin in `row_R`


class _Copy(torch.autograd.Function):
    """The copies, or with `adds` the sum of the copies of each original. Backward is the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        original_R: Tensor,
        row_R: Tensor,
        start_M: Tensor,
        adds: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(original_R, row_R, start_M)
        ctx.back = not adds, x.dtype
        if adds:
            return sum_bags(x, row_R, start_M, dtype)
        return as_dtype(x.index_select(0, original_R), dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return apply(_Copy, grad, *ctx.saved_tensors, *ctx.back), None, None, None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, original_R: Tensor, row_R: Tensor, start_M: Tensor) -> object:
        rules.ignore(row_R)
        rules.ignore(start_M)
        # As a product with a matrix of ones and zeros: linear in the rows.
        return rules.einsum("n...,m->m...", x, original_R, linear_in=(0,))


def copy(x_MD: T, copies: Copies) -> T:
    """Each row's original: `[R, D]`."""
    return _moved(x_MD, copies, False, x_MD.dtype)


def add_copies(x_RD: T, copies: Copies, dtype: torch.dtype | None = None) -> T:
    """The sum of the copies of each original, in the order of `row_R`: `[M, D]`."""
    return _moved(x_RD, copies, True, dtype or x_RD.dtype)


def _moved(x: T, copies: Copies, adds: bool, dtype: torch.dtype) -> T:
    return apply(_Copy, x, copies.original_R, copies.row_R, copies.start_M, adds, dtype)
