"""Rows times the router's weights, rounded once, in one pass."""

# Shape letters in this file:
#   R  rows at this rank's experts    A  any width

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor

from spmd_moe.core.compute_dtype import as_dtype
from spmd_moe.core.torch_modes import is_unobserved

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument


def scaled(x_RA: T, scores_R: Tensor) -> T:
    """Each row times its weight, in the dtype of the rows.

    Scores are often wider than the rows: the product is rounded, not the score.
    """
    if scores_R.dtype is x_RA.dtype:
        return cast(T, x_RA * scores_R.unsqueeze(1))
    if is_unobserved() and not torch.compiler.is_compiling():
        return cast(T, torch.ops.spmd_moe.scale.default(x_RA, scores_R))
    # A compiler fuses these two.
    return cast(T, as_dtype(x_RA * scores_R.unsqueeze(1), x_RA.dtype))


def _scale(x_RA: Tensor, scores_R: Tensor) -> Tensor:
    return torch.mul(x_RA, scores_R.unsqueeze(1), out=torch.empty_like(x_RA))


# One operator, because a selective checkpoint may save the result of any operator, and `out=` would
# write into saved memory.
_OPERATORS = torch.library.Library("spmd_moe", "FRAGMENT")
_OPERATORS.define("scale(Tensor x, Tensor scores) -> Tensor")
_OPERATORS.impl("scale", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("spmd_moe::scale", lambda x, scores: torch.empty_like(x))
