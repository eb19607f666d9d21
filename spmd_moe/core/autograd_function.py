"""Calls of autograd functions, which cost nothing where no graph is recorded and nothing checks.

The layer writes each operator once, as an `autograd.Function` with a declared type. This file alone
asks whether autograd records it or a checker follows it.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor

from spmd_moe.core.moves import wait_for
from spmd_moe.core.torch_modes import is_unchecked

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument


class _Discarded:
    """In place of `ctx` where there is no backward: what forward saves is released at once."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def apply(function: type[torch.autograd.Function], x: T, *more: object) -> T:
    """The result of an autograd function, of the kind that `x` has."""
    if _is_unobserved():
        return cast(T, function.forward(_Discarded(), x, *more))
    return cast(T, function.apply(x, *more))


def finish(y: T) -> T:
    """Wait for a result that is returned to the user; the tensor returned is not a view."""
    if _is_unobserved():
        return wait_for(y)  # torch never releases a result that is neither read nor waited for
    # A copy waits as well, and is no view: to add to one in place would lose the hook by which
    # FSDP gathers for backward.
    return cast(T, y.clone())


def no_rows(x: T, like: Tensor, dim: int) -> T:
    """`[0, dim]`, of the dtype and device of `like`, and of the kinds of `x` if a checker asks."""
    if is_unchecked():
        none = torch.zeros(0, dim, dtype=like.dtype, device=like.device)
    else:
        none = x.reshape(-1).narrow(0, 0, 0).to(like.device, like.dtype).view(0, dim)
    return cast(T, none)


def _is_unobserved() -> bool:
    """No graph is recorded, and no checker follows: only the values are needed."""
    return not torch.is_grad_enabled() and is_unchecked()
