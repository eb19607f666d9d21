"""Does somebody follow operators, or do tensors simply have values here?

torch has no public question for it. What is private to torch is asked in this file alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import _is_torch_function_mode_enabled
from torch.utils._python_dispatch import _len_torch_dispatch_stack

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def followed(*tensors: Tensor | None) -> bool:
    """By a compiler, a tracer, a mode, a transform of functions, or a class of tensors."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, tensors))
        or _len_torch_dispatch_stack() > 0
        or _is_torch_function_mode_enabled()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
    )
