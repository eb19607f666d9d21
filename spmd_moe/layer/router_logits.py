"""The router's product, in a dtype of its own, of tokens that are not padding."""

# Shape letters in this file:
#   T  tokens    D  model width    E  experts

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.core.autograd_function import apply
from spmd_moe.core.compute_dtype import as_dtype, no_autocast
from spmd_moe.core.float32_matmul import float32_matmul, is_reduced
from spmd_moe.core.placement import Tokens, Whole
from spmd_moe.core.spmd_types_compat import rules

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument


class _Gate(torch.autograd.Function):
    """Keeps what the caller has anyway, not what it is made into: tokens in float32 are twice those
    of a model in bfloat16, and tokens without padding are a copy."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ED: Tensor, mask_T: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED, mask_T)
        with no_autocast(x_TD):
            x_TD, weight_ED = as_dtype(_masked(x_TD, mask_T), dtype), as_dtype(weight_ED, dtype)
            if is_reduced(x_TD):
                return float32_matmul(x_TD, weight_ED.t())
            return fn.linear(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED, mask_T = ctx.saved_tensors
        dtype = grad_TE.dtype
        dx_TD = dw_ED = None
        with no_autocast(x_TD):
            if ctx.needs_input_grad[0]:
                dx_TD = float32_matmul(grad_TE, as_dtype(weight_ED, dtype))
                dx_TD = as_dtype(_masked(dx_TD, mask_T), x_TD.dtype)
            if ctx.needs_input_grad[1]:
                dw_ED = float32_matmul(grad_TE.t(), as_dtype(_masked(x_TD, mask_T), dtype))
                dw_ED = as_dtype(dw_ED, weight_ED.dtype)
        return dx_TD, dw_ED, None, None

    @staticmethod
    def spmd_typecheck(*, x_TD: Tensor, weight_ED: Tensor, mask_T: Tensor | None) -> object:
        if mask_T is None:
            return rules.einsum("td,ed->te", x_TD, weight_ED)
        return rules.einsum("td,ed,t->te", x_TD, weight_ED, mask_T, linear_in=(0, 1))


def router_logits(
    x_TD: Tokens, weight_ED: Whole, mask_T: Tokens | None, product: torch.dtype, dtype: torch.dtype
) -> Tokens:
    """The logits, in `dtype`, of a matmul in `product`, also under autocast. 0 of padding.

    Choices depend on low bits, so `product` is float32 unless `in_model_dtype` is set.
    """
    return as_dtype(_in_dtype(x_TD, weight_ED, mask_T, product), dtype)


def _in_dtype(x_TD: Tokens, weight_ED: Whole, mask_T: Tokens | None, dtype: torch.dtype) -> Tokens:
    # Autograd saves the same tensors, but its products use the precision that the program allows.
    if mask_T is None and x_TD.dtype is weight_ED.dtype is dtype and not is_reduced(x_TD):
        with no_autocast(x_TD):
            return fn.linear(x_TD, weight_ED)
    return apply(_Gate, x_TD, weight_ED, mask_T, dtype)


def mask_rows(x_TD: Tokens, mask_T: Tokens | None) -> Tokens:
    """Zeros in the rows of padding, so that it reaches neither values nor gradients."""
    return _masked(x_TD, mask_T)


def _masked(x_TD: T, mask_T: T | None) -> T:
    return x_TD if mask_T is None else cast(T, x_TD.masked_fill(~mask_T.unsqueeze(1), 0.0))
