"""Which dtype to compute in: what a sum needs, and what autocast asks for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)


def sum_dtype(x: Tensor) -> torch.dtype:
    """What a sum over ranks should be taken in: float32, or float64 if `x` is that."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def as_dtype(x: T, dtype: torch.dtype) -> T:
    """`x.to(dtype)`, without the call where there is nothing to do: it takes as long as an add."""
    return x if x.dtype is dtype else cast(T, x.to(dtype))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What the operands of a matmul are taken to: what autocast asks for, or the dtype of `x`.

    Backward runs when autocast has ended, so who writes his own has to remember it.
    """
    if x.dtype is torch.float64 or not _under_autocast(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def dtypes_match(x: Tensor, weight: Tensor) -> bool:
    """Tokens and a weight: alike, or autocast takes the weight to what the tokens are."""
    return x.dtype is weight.dtype or x.dtype is matmul_dtype(weight)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast stays out of what has a dtype of its own: choices and sums depend on small bits."""
    if _under_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _under_autocast(x: Tensor) -> bool:
    # A device's type is a string that is built in each call: as slow as two small steps.
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # torch refuses "meta"
