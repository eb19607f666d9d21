"""A row and its weight as one row, so that one exchange carries both."""

# Shape letters in this file:
#   T  tokens    D  model width    N  rows, of slots that have an expert

from __future__ import annotations

from typing import Any

import torch
from spmd_types import register_local_autograd_function
from torch import Tensor

from spmd_moe.core.placement import Rows, Tokens
from spmd_moe.core.torch_state import is_unobserved


def pack(x_ND: Tokens, scores_N: Tokens) -> Tokens:
    """Rows with the bits of their weights behind them."""
    if is_unobserved():
        packed: Tokens = _packed(x_ND, scores_N)
    else:
        packed = _Pack.apply(x_ND, scores_N)  # type: ignore[no-untyped-call]  # torch
    return packed


def unpack(packed: Rows, width: int, dtype: torch.dtype) -> tuple[Rows, Rows]:
    """The rows, and their weights in `dtype`."""
    if is_unobserved():
        parts: tuple[Rows, Rows] = _unpacked(packed, width, dtype)
    else:
        parts = _Unpack.apply(packed, width, dtype)  # type: ignore[no-untyped-call]  # torch
    return parts


# spmd: allow unknown - a kernel: the same for rows of whatever kind
def _packed(x_ND: Tensor, scores_N: Tensor) -> Tensor:
    # A score in a row of wider numbers is widened, in one of narrower ones it is cut in parts.
    widened = scores_N.to(torch.promote_types(x_ND.dtype, scores_N.dtype))
    parts = widened.itemsize // x_ND.itemsize
    bits = widened.contiguous().view(x_ND.dtype).view(x_ND.shape[0], parts)
    return torch.cat([x_ND, bits], 1)


# spmd: allow unknown - a kernel: the same for rows of whatever kind
def _unpacked(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    widened = torch.promote_types(packed.dtype, dtype)
    bits = packed.narrow(1, width, packed.shape[1] - width)
    # Not contiguous(): one row, or none, is that already, and may begin within a wider number.
    bits = bits.clone(memory_format=torch.contiguous_format)
    scores = bits.view(widened).view(packed.shape[0]).to(dtype)
    return packed.narrow(1, 0, width).contiguous(), scores


@register_local_autograd_function
class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, scores_N: Tensor) -> Tensor:
        ctx.back = x_ND.shape[1], scores_N.dtype
        return _packed(x_ND, scores_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return unpack(grad, *ctx.back)


@register_local_autograd_function
class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _unpacked(packed, width, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        return pack(grad, grad_scores), None, None
