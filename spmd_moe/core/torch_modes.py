"""Whether torch is compiling, a mode or a transform is active, or a tensor is of another kind.

torch has no public questions for it. These are asked in this file alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    is_batchedtensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import _get_current_function_mode_stack, _is_torch_function_mode_enabled
from torch.utils._device import DeviceContext


def is_unchecked() -> bool:
    """Whether no TorchFunctionMode, such as spmd_types' checker, is active: no kinds are needed.

    A compiler needs none either, and declaring a kind would break its graph. A default device is
    a TorchFunctionMode too, but checks nothing.
    """
    if torch.compiler.is_compiling() or not _is_torch_function_mode_enabled():
        return True
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def function_transform(tensors: Iterable[Tensor]) -> str | None:
    """The name of the transform that a call is in: of torch.func, or forward AD of any tensor."""
    if torch.compiler.is_compiling():
        return None
    if peek_interpreter_stack() is not None:
        return "torch.func (grad, vmap, jvp, ...)"
    in_forward_ad = forward_ad._current_level >= 0
    if in_forward_ad and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "forward-mode AD"
    return None


def is_vmapped(x: Tensor) -> bool:
    """Many tensors in one, as torch.vmap makes them."""
    if torch.compiler.is_compiling():
        return False
    return is_batchedtensor(x) or is_legacy_batchedtensor(x)


def is_dtensor(x: Tensor) -> bool:
    """A DTensor, of which torch knows what each rank has."""
    return isinstance(x, DTensor)


def fsdp_casts(module: nn.Module) -> bool:
    """FSDP takes its weights, and the rows it is given, to another dtype when it runs."""
    if not isinstance(module, FSDPModule):
        return False
    policy = module._get_fsdp_state()._mp_policy
    return policy.param_dtype is not None


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: copies to and from the host are not allowed."""
    if x.is_cpu or torch.compiler.is_compiling():
        return False
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
