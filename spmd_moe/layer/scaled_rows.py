"""Rows times the router's weights, rounded once, in one pass."""

# Shape letters in this file:
#   R  rows at this rank's experts    A  any width

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from spmd_moe.core.autograd_function import apply
from spmd_moe.core.compute_dtype import as_dtype
from spmd_moe.core.spmd_types_compat import rules

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument


class _Scale(torch.autograd.Function):
    """Rows times weights of another dtype. Backward is the same for rows, a sum for weights."""

    @staticmethod
    def forward(ctx: Any, x_RA: Tensor, scores_R: Tensor) -> Tensor:
        ctx.save_for_backward(x_RA, scores_R)
        return cast(Tensor, torch.ops.spmd_moe.scale.default(x_RA, scores_R))

    @staticmethod
    def backward(ctx: Any, dy_RA: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x_RA, scores_R), dx_RA, ds_R = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dx_RA = apply(_Scale, dy_RA, scores_R)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(x_RA.dtype, scores_R.dtype)
            ds_R = as_dtype((as_dtype(dy_RA, wide) * x_RA).sum(1), scores_R.dtype)
        return dx_RA, ds_R

    @staticmethod
    def spmd_typecheck(*, x_RA: Tensor, scores_R: Tensor) -> object:
        return rules.einsum("ra,r->ra", x_RA, scores_R, linear_in=(0,))


def scaled(x_RA: T, scores_R: Tensor) -> T:
    """Each row times its weight, in the dtype of the rows.

    Scores are often wider than the rows: the product is rounded, not the score.
    """
    if scores_R.dtype is x_RA.dtype or torch.compiler.is_compiling():  # a compiler fuses both steps
        return cast(T, as_dtype(x_RA * scores_R.unsqueeze(1), x_RA.dtype))
    return apply(_Scale, x_RA, scores_R)


def _scale(x_RA: Tensor, scores_R: Tensor) -> Tensor:
    return torch.mul(x_RA, scores_R.unsqueeze(1), out=torch.empty_like(x_RA))


# One operator, because a selective checkpoint may save the result of any operator, and `out=` would
# write into saved memory.
_OPERATORS = torch.library.Library("spmd_moe", "FRAGMENT")
_OPERATORS.define("scale(Tensor x, Tensor scores) -> Tensor")
_OPERATORS.impl("scale", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("spmd_moe::scale", lambda x, scores: torch.empty_like(x))
