"""What a record of a model family says, and how it is read from one block of a model.

A record names the submodules and attributes of transformers' block. What the block cannot be
turned into, because the layer has no such setting, is told by name: nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any, Literal, TypeAlias, cast, final

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from spmd_moe.hf.file_tensors import WHICH
from spmd_moe.layer.activations import SQUARED_RELU, SWIGLU, Activation
from spmd_moe.layer.moe import SharedConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.layer.router_scores import ScoreName

Dims: TypeAlias = tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of transformers' block: its name there, ours, and its dims (see file_tensors.py)."""

    theirs: str
    ours: tuple[str, ...]
    dims: Dims


W1, W3, W2 = "experts.w1_eFD", "experts.w3_eFD", "experts.w2_eDF"
B1, B3, B2 = "experts.b1_eF", "experts.b3_eF", "experts.b2_eD"
PLAIN2, PLAIN3 = ((0,), (1,)), ((0,), (1,), (2,))

# How transformers keeps the experts in memory.
FUSED = (  # gate_up [E, 2F, D], gate in the first half
    Held("experts.gate_up_proj", (W1, W3), ((0,), (WHICH, 1), (2,))),
    Held("experts.down_proj", (W2,), PLAIN3),
)
TRANSPOSED = (  # gate_up [E, D, 2F]
    Held("experts.gate_up_proj", (W1, W3), ((0,), (2,), (WHICH, 1))),
    Held("experts.down_proj", (W2,), ((0,), (2,), (1,))),
)
INTERLEAVED = (  # gate_up [E, D, 2F], gate and up in turn, with biases
    Held("experts.gate_up_proj", (W1, W3), ((0,), (2,), (1, WHICH))),
    Held("experts.down_proj", (W2,), ((0,), (2,), (1,))),
    Held("experts.gate_up_proj_bias", (B1, B3), ((0,), (1, WHICH))),
    Held("experts.down_proj_bias", (B2,), PLAIN2),
)
TRANSPOSED_BIASED = (
    *TRANSPOSED,
    Held("experts.gate_up_proj_bias", (B1, B3), ((0,), (WHICH, 1))),
    Held("experts.down_proj_bias", (B2,), PLAIN2),
)
UNGATED = (  # up [E, F, D]
    Held("experts.up_proj", (W1,), PLAIN3),
    Held("experts.down_proj", (W2,), PLAIN3),
)
STACKED_ROWS = (  # [E * F, D]
    Held("experts.mlp.w1", (W1,), ((0, 1), (2,))),
    Held("experts.mlp.v1", (W3,), ((0, 1), (2,))),
    Held("experts.mlp.w2", (W2,), ((0, 2), (1,))),
)
TWO_LINEARS = (
    Held("input_linear.weight", (W1, W3), ((0,), (WHICH, 1), (2,))),
    Held("output_linear.weight", (W2,), PLAIN3),
)


@final
@dataclass(frozen=True, slots=True)
class Groups:
    """Attributes: how many groups of experts, how many a token uses; and how a group is scored.

    `when`: an attribute, and the value with which there are groups.
    """

    count: str
    kept: str
    best: Literal[1, 2]
    when: tuple[str, object] | None = None

    def read(self, block: nn.Module) -> tuple[int, int]:
        count = attribute(block, self.count)
        if count is None or (self.when and attribute(block, self.when[0]) != self.when[1]):
            return 1, 1
        return count, attribute(block, self.kept)


@final
@dataclass(frozen=True, slots=True)
class Need:
    """An attribute that must have one of some values; `missing`: what the layer cannot do else."""

    attribute: str
    values: tuple[object, ...]
    missing: str


@final
@dataclass(frozen=True, slots=True)
class Family:
    """One kind of MoE block of transformers. Texts are attributes, relative to the block."""

    name: str  # the folder in transformers.models
    block: str  # the class
    score: ScoreName | str  # a name, or the attribute of a function that scores
    norm: bool | str = True
    scale: tuple[str, ...] = ()  # their product
    groups: Groups | None = None
    top_k: str = "gate.top_k"
    gate: str = "gate"  # the router, whose first output is its logits
    weight: str = "gate.weight"
    weight_bias: str | None = None  # a part of the logits
    bias: str | None = None  # steers the choice
    layout: tuple[Held, ...] = FUSED
    activation: Callable[[nn.Module], Activation] | None = None
    shared_activation: Callable[[nn.Module], Activation] | None = None
    shared: str | None = None
    shared_gate: str | None = None
    after: tuple[str, ...] = ()  # modules that the output passes
    returns: Literal["hidden", "pair"] = "hidden"
    needs: tuple[Need, ...] = ()

    @property
    def modeling(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"


def attribute(block: object, path: str) -> Any:
    return attrgetter(path)(block)


def held(family: Family, block: nn.Module) -> list[Held]:
    """Every tensor of the block that is a parameter or buffer of ours."""
    tensors = [*family.layout, Held(family.weight, ("router.weight_ED",), PLAIN2)]
    if family.weight_bias is not None:
        tensors.append(Held(family.weight_bias, ("router.b_E",), ((0,),)))
    if family.bias is not None:
        ones = attribute(block, family.bias).ndim - 1
        tensors.append(Held(family.bias, ("router.bias_E",), (((),) * ones) + ((0,),)))
    if family.shared is not None and getattr(block, family.shared, None) is not None:
        tensors += _of_shared(family.shared, attribute(block, family.shared))
        if family.shared_gate is not None:
            tensors.append(Held(f"{family.shared_gate}.weight", ("shared.gate_1D",), PLAIN2))
    return tensors


def _of_shared(name: str, shared: nn.Module) -> list[Held]:
    if hasattr(shared, "gate_up_proj"):
        both = ("shared.w1_FD", "shared.w3_FD")
        first = [Held(f"{name}.gate_up_proj.weight", both, ((WHICH, 0), (1,)))]
    elif hasattr(shared, "gate_proj"):
        first = [
            Held(f"{name}.gate_proj.weight", ("shared.w1_FD",), PLAIN2),
            Held(f"{name}.up_proj.weight", ("shared.w3_FD",), PLAIN2),
        ]
    else:
        first = [Held(f"{name}.up_proj.weight", ("shared.w1_FD",), PLAIN2)]
    return [*first, Held(f"{name}.down_proj.weight", ("shared.w2_DF",), PLAIN2)]


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """What a block says, in the terms of `MoEConfig`."""

    dim: int
    hidden_dim: int
    router: RouterConfig
    activation: Activation
    bias: bool
    shared: SharedConfig | None


def read_block(family: Family, block: nn.Module, dtype: torch.dtype) -> Settings | str:
    """The settings of a block, or what the layer lacks for it."""
    for need in family.needs:
        value = attribute(block, need.attribute)
        if value not in need.values:
            return f"{need.attribute} is {value!r}: {need.missing}"
    activation, of_shared = _activation(family, block), _shared_activation(family, block)
    if isinstance(activation, str):
        return activation
    if isinstance(of_shared, str):
        return f"in the shared expert {of_shared}"
    tensors = held(family, block)
    if left := _left_over(family, block, tensors):
        return f"it has {left!r}, for which the layer has no place"
    shapes = _our_shapes(block, tensors)
    score = family.score if family.score in SCORES else _score(attribute(block, family.score))
    if score is None:
        return f"{family.score} is a function that the router does not have"
    scale = 1.0
    for path in family.scale:
        scale *= float(attribute(block, path))
    groups = family.groups
    count, kept = groups.read(block) if groups else (1, 1)
    norm = attribute(block, family.norm) if isinstance(family.norm, str) else family.norm
    experts, dim = shapes["router.weight_ED"]
    router = RouterConfig(
        experts,
        attribute(block, family.top_k),
        score_func=cast(ScoreName, score),
        route_norm=bool(norm),
        route_scale=scale,
        num_expert_groups=count,
        num_limited_groups=kept,
        group_score_top_k=groups.best if groups else 2,
        dtype=dtype,
        bias=family.weight_bias is not None,
    )
    shared = None
    if "shared.w1_FD" in shapes:
        other = None if of_shared is activation else of_shared
        gated = "shared.gate_1D" in shapes
        shared = SharedConfig(shapes["shared.w1_FD"][0], gated=gated, activation=other)
    return Settings(dim, shapes[W1][1], router, activation, B2 in shapes, shared)


def _left_over(family: Family, block: nn.Module, tensors: Sequence[Held]) -> str | None:
    """A parameter or buffer of the block that no tensor of ours holds."""
    known = {tensor.theirs for tensor in tensors}
    names = (name for name in block.state_dict() if not name.startswith(tuple(family.after)))
    return next((name for name in names if name not in known), None)


def _our_shapes(block: nn.Module, tensors: Sequence[Held]) -> dict[str, tuple[int, ...]]:
    experts = attribute(block, _weight_of(tensors)).shape[0]
    found: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        theirs = attribute(block, tensor.theirs).shape
        sizes: dict[int, int] = {}
        for group, size in zip(tensor.dims, theirs, strict=True):
            others = [dim for dim in group if dim != WHICH]
            size //= len(tensor.ours) if WHICH in group else 1
            if len(others) == 2:  # experts and another dim, as one
                sizes[others[0]], sizes[others[1]] = experts, size // experts
            elif others:
                sizes[others[0]] = size
        for name in tensor.ours:
            found[name] = tuple(sizes[dim] for dim in sorted(sizes))
    return found


def _weight_of(tensors: Sequence[Held]) -> str:
    return next(tensor.theirs for tensor in tensors if tensor.ours == ("router.weight_ED",))


# --- scores and activations -------------------------------------------------------------------

SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus")
_SCORE_OF_CLASS = {
    "Sigmoid": "sigmoid",
    "SqrtSoftplusActivation": "sqrt_softplus",
}


def _score(value: object) -> str | None:
    """A name that the block has, such as `softmax`, or the class of a function."""
    if isinstance(value, str):
        return value if value in SCORES else None
    return _SCORE_OF_CLASS.get(type(value).__name__)


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


_GATED: Mapping[str, Callable[[], Activation]] = {
    "SiLUActivation": lambda: SWIGLU,
    "SiLU": lambda: SWIGLU,
    "silu": lambda: SWIGLU,
    "GELUActivation": lambda: _gelu("gelu_glu", "none"),
    "GELUTanh": lambda: _gelu("gelu_tanh_glu", "tanh"),
}


def _activation(family: Family, block: nn.Module) -> Activation | str:
    if family.activation is not None:
        return family.activation(block)
    experts = getattr(block, "experts", block)
    return _of_function(_function_of(experts), gated=family.layout is not UNGATED)


def _shared_activation(family: Family, block: nn.Module) -> Activation | str | None:
    shared = getattr(block, family.shared, None) if family.shared else None
    if shared is None:
        return None
    if family.shared_activation is not None:
        return family.shared_activation(block)
    return _of_function(_function_of(shared), gated=family.layout is not UNGATED)


def _of_function(function: object, *, gated: bool) -> Activation | str:
    """Our activation, for a function of transformers."""
    name = getattr(function, "__name__", type(function).__name__)
    if not gated:
        return SQUARED_RELU if name == "ReLUSquaredActivation" else f"activation {name}, not gated"
    return _GATED[name]() if name in _GATED else f"activation {name}"


def _function_of(owner: nn.Module) -> object:
    for path in ("act_fn", "mlp.activation_fn", "activation"):
        try:
            return attribute(owner, path)
        except AttributeError:
            continue
    return None
