"""Does somebody follow what is computed, or keep it otherwise, or do tensors simply have values?

torch has no public questions for it. These are asked in this file alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch._C._functorch import peek_interpreter_stack
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import _is_torch_function_mode_enabled
from torch.utils._python_dispatch import _len_torch_dispatch_stack

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def is_traced(*tensors: Tensor | None) -> bool:
    """By a compiler, a tracer, a mode, a transform of functions, or a class of tensors."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, tensors))
        or _len_torch_dispatch_stack() > 0
        or _is_torch_function_mode_enabled()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
    )


def is_unchecked() -> bool:
    """No mode of functions, as spmd_types' checker is one: then kinds are nobody's concern.

    Nor are they a compiler's, which would break its graph where a kind is declared.
    """
    return torch.compiler.is_compiling() or not _is_torch_function_mode_enabled()


def is_unobserved() -> bool:
    """No checker, and no autograd: an `autograd.Function` has nobody to tell, and its kernel is
    called as it is."""
    return not torch.is_grad_enabled() and is_unchecked()


def is_dtensor(x: Tensor) -> bool:
    """A DTensor, of which torch knows what each rank has."""
    return isinstance(x, DTensor)


def fsdp_casts(module: nn.Module) -> bool:
    """FSDP takes its weights, and the rows it is given, to another dtype when it runs."""
    if not isinstance(module, FSDPModule):
        return False
    policy = module._get_fsdp_state()._mp_policy
    return policy.param_dtype is not None
