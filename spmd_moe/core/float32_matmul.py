"""Float32 matmuls in full precision, also where the program allows TF32 for other matmuls.

`torch.set_float32_matmul_precision("high")` lets CUDA take TF32, with 10 bits of mantissa, and a
CPU take bfloat16. That suits most matmuls of a model, but not the choice of experts.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, cast, final

import torch
from torch import Tensor

_REDUCED = ("tf32", "bf16")
_precision = torch._C._get_fp32_precision_getter  # torch.backends takes five times as long


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices, in the full precision of their dtype."""
    if a.dtype is not torch.float32:
        return a @ b
    if torch.compiler.is_compiling():  # an operator, which sets the precision at run time
        return cast(Tensor, torch.ops.spmd_moe.float32_matmul.default(a, b))
    if not is_reduced(a):
        return a @ b
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return cast(Tensor, _Product.apply(a, b))  # type: ignore[no-untyped-call]  # torch
    return _in_full(a, b)


def is_reduced(x: Tensor) -> bool:
    """Whether a plain matmul of `x` may use less than float32, now or when a graph runs."""
    if x.dtype is not torch.float32:
        return False
    return torch.compiler.is_compiling() or _precision(_backend(x), "matmul") in _REDUCED


def _backend(x: Tensor) -> str:
    return "mkldnn" if x.is_cpu else "cuda"


class _Product(torch.autograd.Function):
    """A product whose derivatives set the precision again, because they run later."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _in_full(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return float32_matmul(grad, b.t()), float32_matmul(a.t(), grad)


def _in_full(a: Tensor, b: Tensor) -> Tensor:
    with _full_precision:
        return torch.mm(a, b)


@final
class _FullPrecision:
    """A block in which matmuls are in float32.

    The setting is global: the first thread that enters changes it, the last one restores it.
    Meanwhile matmuls of other threads may be more precise, never less.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._before: tuple[str | None, str, str] = None, "none", "none"

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = _settings()
                _set("highest" if self._before[0] else None, "ieee", "ieee")
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _set(*self._before)


_full_precision = _FullPrecision()


def _settings() -> tuple[str | None, str, str]:
    """The setting of torch's older interface (None: unreadable), and that of each backend."""
    try:
        older = torch._C._get_float32_matmul_precision()
    except RuntimeError:  # raised if both interfaces contradict each other
        older = None
    return older, _precision("cuda", "matmul"), _precision("mkldnn", "matmul")


def _set(older: str | None, cuda: str, mkldnn: str) -> None:
    """Set both interfaces: torch's profiler raises if they contradict each other."""
    if older is not None:
        torch._C._set_float32_matmul_precision(older)
    for backend, value in (("cuda", cuda), ("mkldnn", mkldnn)):
        if _precision(backend, "matmul") != value:
            torch._C._set_fp32_precision_setter(backend, "matmul", value)


_OPERATOR = torch.library.Library("spmd_moe", "FRAGMENT")
_OPERATOR.define("float32_matmul(Tensor a, Tensor b) -> Tensor")
_OPERATOR.impl("float32_matmul", lambda a, b: _in_full(a, b), "CompositeExplicitAutograd")
torch.library.register_fake(
    "spmd_moe::float32_matmul", lambda a, b: a.new_empty(a.shape[0], b.shape[1])
)
# An exported program differentiates the operator itself.
torch.library.register_autograd(
    "spmd_moe::float32_matmul",
    _Product.backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
