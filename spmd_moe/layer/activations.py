"""What an expert does between its matrices: one small record per activation, forward and backward.

The backward is written out, not left to autograd, because the experts keep only `gate` and `up`
and come back to the activation later. A record without a backward gets one from `forward`.

    SWIGLU           silu(gate) * up                       gated
    clamped_swiglu   GPT-OSS: clamped, sigmoid(1.702 gate) gated
    SQUARED_RELU     relu(gate) ** 2                       plain: w1 and w2, no w3
    GELU             gelu(gate), by erf                    plain
"""

# Shape letters in this file:
#   R  rows at this rank's experts    F  hidden width of an expert

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias, final

import torch
import torch.nn.functional as fn
from torch import Tensor

# gate_RF, up_RF (None when the activation is plain) -> h_RF
Forward: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
# dh_RF, gate_RF, up_RF -> dgate_RF, dup_RF (None when plain)
Backward: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@final
@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function of `gate` and, if `gated`, of `up`.

    Args:
        name: A name that no other activation has.
        gated: Whether the experts have a third matrix, `up`.
        forward: From `gate` and `up` (None if not gated) to the hidden values.
        derivative: From the gradient of the hidden values, `gate` and `up` to the gradients of
            both. Default: derived by `torch.func.vjp`.

    Raises:
        ConfigError: The name is in use.

    Example:
        >>> import torch
        >>> from spmd_moe import Activation
        >>> tanh = Activation("docs_tanh", gated=False, forward=lambda gate, up: torch.tanh(gate))
        >>> print(tanh)
        docs_tanh
    """

    name: str
    gated: bool
    forward: Forward
    derivative: Backward | None = None

    def __deepcopy__(self, memo: object) -> Activation:
        """A copied layer has the same: functions compare by identity."""
        return self

    def __str__(self) -> str:
        return self.name

    def backward(
        self, dh_RF: Tensor, gate_RF: Tensor, up_RF: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of gate and up."""
        # Where they are differentiated again, autograd must know the operators: silu_backward has
        # no derivative, and a user's derivative may work in place.
        if self.derivative is not None and not torch.is_grad_enabled():
            return self.derivative(dh_RF, gate_RF, up_RF)
        return _derived(self.forward, dh_RF, gate_RF, up_RF)


def clamped_swiglu(limit: float = 7.0, alpha: float = 1.702) -> Activation:
    """SwiGLU with clamped inputs, as in GPT-OSS.

    `gate` is clamped from above, `up` from both sides and shifted by one.

    Args:
        limit: The bound of the clamps.
        alpha: The factor inside the sigmoid.

    Returns:
        The activation; equal arguments return the same object.

    Example:
        >>> from spmd_moe import CLAMPED_SWIGLU, clamped_swiglu
        >>> clamped_swiglu() is CLAMPED_SWIGLU
        True
    """
    return _clamped_swiglu(limit, alpha)


@cache  # partial objects compare by identity: the same numbers are the same record
def _clamped_swiglu(limit: float, alpha: float) -> Activation:
    name = f"clamped_swiglu(limit={limit}, alpha={alpha})"
    forward = partial(_clamped_forward, limit, alpha)
    return Activation(name, True, forward, partial(_clamped_backward, limit, alpha))


def _derived(
    forward: Forward, dh_RF: Tensor, gate_RF: Tensor, up_RF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if up_RF is None:
        pull = torch.func.vjp(lambda gate: forward(gate, None), gate_RF)[1]
        return pull(dh_RF)[0], None
    dgate_RF, dup_RF = torch.func.vjp(forward, gate_RF, up_RF)[1](dh_RF)
    return dgate_RF, dup_RF


def _swiglu_forward(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
    assert up_RF is not None
    return fn.silu(gate_RF) * up_RF  # not in place: a checkpoint may keep any operator's result


def _swiglu_backward(
    dh_RF: Tensor, gate_RF: Tensor, up_RF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    assert up_RF is not None
    dup_RF = fn.silu(gate_RF).mul_(dh_RF)
    return torch.ops.aten.silu_backward(dh_RF * up_RF, gate_RF), dup_RF


def _clamped_forward(limit: float, alpha: float, gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
    assert up_RF is not None
    g_RF = gate_RF.clamp(max=limit)
    return g_RF * torch.sigmoid(alpha * g_RF) * (up_RF.clamp(-limit, limit) + 1)


def _clamped_backward(
    limit: float, alpha: float, dh_RF: Tensor, gate_RF: Tensor, up_RF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    assert up_RF is not None
    g_RF = gate_RF.clamp(max=limit)
    sig_RF = torch.sigmoid(alpha * g_RF)
    slope_RF = sig_RF * (1 + alpha * g_RF * (1 - sig_RF))
    dgate_RF = dh_RF * slope_RF * (up_RF.clamp(-limit, limit) + 1)
    dup_RF = dh_RF * g_RF * sig_RF
    # As torch.clamp has it: a value on the limit still passes its gradient.
    return dgate_RF.masked_fill_(gate_RF > limit, 0), dup_RF.masked_fill_(up_RF.abs() > limit, 0)


def _squared_relu_forward(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
    return fn.relu(gate_RF).square()  # not in place: shared experts leave backward to autograd


def _squared_relu_backward(
    dh_RF: Tensor, gate_RF: Tensor, up_RF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return fn.relu(gate_RF).mul_(dh_RF).mul_(2), None


def _gelu_forward(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
    return fn.gelu(gate_RF)


def _gelu_backward(
    dh_RF: Tensor, gate_RF: Tensor, up_RF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return torch.ops.aten.gelu_backward(dh_RF, gate_RF), None


SWIGLU = Activation("swiglu", True, _swiglu_forward, _swiglu_backward)
CLAMPED_SWIGLU = clamped_swiglu()
SQUARED_RELU = Activation("squared_relu", False, _squared_relu_forward, _squared_relu_backward)
GELU = Activation("gelu", False, _gelu_forward, _gelu_backward)
