"""The activations of transformers' experts, as ours."""

# Shape letters in this file:
#   R  rows at this rank's experts    F  hidden width of an expert

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from operator import attrgetter

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from spmd_moe.layer.activations import SQUARED_RELU, SWIGLU, Activation


def _gelu_glu(approximate: str, gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
    assert up_RF is not None
    return fn.gelu(gate_RF, approximate=approximate) * up_RF


@cache  # functions compare by identity
def clamped_silu_glu(limit: float) -> Activation:
    """DeepSeek-V4, GLM-5: gate clamped from above and up from both sides, before silu."""

    def forward(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
        assert up_RF is not None
        return fn.silu(gate_RF.clamp(max=limit)) * up_RF.clamp(-limit, limit)

    return Activation(f"clamped_silu_glu(limit={limit})", True, forward)


@cache
def silu_glu_clamped_after(limit: float) -> Activation:
    """Step-3.7: clamped after silu."""

    def forward(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
        assert up_RF is not None
        return fn.silu(gate_RF).clamp(max=limit) * up_RF.clamp(-limit, limit)

    return Activation(f"silu_glu_clamped_after(limit={limit})", True, forward)


@cache
def _gelu(name: str, approximate: str) -> Activation:
    return Activation(name, True, lambda gate, up: _gelu_glu(approximate, gate, up))


@cache
def softcapped_glu(gate_cap: float, up_cap: float) -> Activation:
    """Inkling-2: the sigmoid sees the gate as it is, both factors are bounded by a tanh."""

    def forward(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
        assert up_RF is not None
        gate = torch.tanh(gate_RF / gate_cap) * gate_cap * torch.sigmoid(gate_RF)
        return gate * (torch.tanh(up_RF / up_cap) * up_cap)

    return Activation(f"softcapped_glu(gate={gate_cap}, up={up_cap})", True, forward)


_GATED: Mapping[str, Callable[[], Activation]] = {
    "SiLUActivation": lambda: SWIGLU,
    "SiLU": lambda: SWIGLU,
    "silu": lambda: SWIGLU,
    "GELUActivation": lambda: _gelu("gelu_glu", "none"),
    "GELUTanh": lambda: _gelu("gelu_tanh_glu", "tanh"),
}


def _name(function: object) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def of_function(function: object, *, gated: bool) -> Activation | str:
    """Our activation, for a function of transformers."""
    name = _name(function)
    if not gated:
        return SQUARED_RELU if name == "ReLUSquaredActivation" else f"activation {name}, not gated"
    return _GATED[name]() if name in _GATED else f"activation {name}"


def function_of(owner: nn.Module) -> object:
    for path in ("act_fn", "mlp.activation_fn", "activation", "activation_fn"):
        try:
            return attrgetter(path)(owner)
        except AttributeError:
            continue
    return None


def other_than_silu(owner: nn.Module) -> str | None:
    """The missing feature if experts clamp a function other than silu; None for silu."""
    function = function_of(owner)
    if function is None or of_function(function, gated=True) is SWIGLU:
        return None  # None: the experts call silu by name
    return f"activation {_name(function)}, clamped"
