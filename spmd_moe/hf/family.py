"""Records of model families, and how settings are read from one block of a model.

A record names the submodules and attributes of transformers' block. If the layer cannot express a
setting of the block, an error names the setting: nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal, TypeAlias, cast, final

import torch
from torch import nn

from spmd_moe.hf.element_map import WHICH
from spmd_moe.hf.family_activations import function_of, of_function
from spmd_moe.layer.activations import Activation
from spmd_moe.layer.moe_config import ScoreApplication, SharedConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.layer.router_scores import RankName, ScoreName

Dims: TypeAlias = tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of transformers' block: its name there, ours, and its dims (see element_map.py)."""

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
EXPERTS = (  # as FUSED, where the block is the experts alone
    Held("gate_up_proj", (W1, W3), ((0,), (WHICH, 1), (2,))),
    Held("down_proj", (W2,), PLAIN3),
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
    score: str  # a ScoreName, or the attribute that has the name or the function
    norm: bool | str = True
    norm_eps: float = 0.0  # unless it is lost in rounding
    softcap: str | None = None  # of the logits; 0 for none
    choose_by: RankName | None = None
    excluded_score: float = -math.inf
    application: ScoreApplication = ScoreApplication.BEFORE_SECOND_MATMUL
    scale: tuple[str, ...] = ()  # their product
    groups: Groups | None = None
    top_k: str = "gate.top_k"
    gate: str = "gate"  # the router, whose first output is its logits
    weight: str = "gate.weight"
    weight_bias: str | None = None  # a part of the logits
    bias: str | None = None  # selection bias
    layout: tuple[Held, ...] = FUSED
    activation: Callable[[nn.Module], Activation | str] | None = None
    shared_activation: Callable[[nn.Module], Activation | str] | None = None
    shared: str | None = None
    shared_gate: str | None = None
    before: tuple[str, ...] = ()  # modules that the input of the experts passes, not the router's
    after: tuple[str, ...] = ()  # modules that the output passes
    beside: tuple[str, ...] = ()  # modules of the block's input, whose output is added at the end
    latent: tuple[str, str] | None = None  # projections around the experts, if they are Linear
    returns: Literal["hidden", "pair"] = "hidden"
    needs: tuple[Need, ...] = ()
    routed: str | None = None  # the block has experts only: the parent's top_k

    @property
    def modeling(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def kept(self) -> tuple[str, ...]:
        """Modules of transformers that stay in the block."""
        return (*self.before, *self.after, *self.beside)

    def of_block(self, block: nn.Module) -> Family:
        """The record of one block: with or without projections around its experts.

        The shared expert has the width of the block's input, the layer that of the projected one.
        """
        if self.latent is None or not isinstance(attribute(block, self.latent[0]), nn.Linear):
            return self
        first, last = self.latent
        assert self.shared is not None
        return replace(self, before=(first,), after=(last,), beside=(self.shared,), shared=None)


def attribute(block: object, path: str) -> Any:
    return attrgetter(path)(block)


def held(family: Family, block: nn.Module) -> list[Held]:
    """Every tensor of the block that is a parameter or buffer of ours."""
    if family.routed is not None:
        return list(family.layout)
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
    application: ScoreApplication


def read_block(
    family: Family, block: nn.Module, dtype: torch.dtype, parent: nn.Module
) -> Settings | str:
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
    shapes = _our_shapes(block, tensors, attribute(block, family.weight).shape[0])
    if family.routed is not None:
        top_k = attribute(parent, family.routed)
        router: RouterConfig | str = RouterConfig(shapes[W1][0], top_k, dtype=dtype, given=True)
    else:
        num_experts, width = shapes["router.weight_ED"]
        router = _router(family, block, dtype, num_experts, width if family.before else None)
    if isinstance(router, str):
        return router
    shared = None
    if "shared.w1_FD" in shapes:
        other = None if of_shared is activation else of_shared
        gated = "shared.gate_1D" in shapes
        shared = SharedConfig(shapes["shared.w1_FD"][0], gated=gated, activation=other)
    _, hidden_dim, dim = shapes[W1]
    return Settings(dim, hidden_dim, router, activation, B2 in shapes, shared, family.application)


def _router(
    family: Family, block: nn.Module, dtype: torch.dtype, num_experts: int, input_dim: int | None
) -> RouterConfig | str:
    score = family.score if family.score in SCORES else _score(attribute(block, family.score))
    if score is None:
        return f"{family.score} is a function that the router does not have"
    scale = 1.0
    for path in family.scale:
        scale *= float(attribute(block, path))
    groups = family.groups
    count, kept = groups.read(block) if groups else (1, 1)
    norm = attribute(block, family.norm) if isinstance(family.norm, str) else family.norm
    cap = attribute(block, family.softcap) if family.softcap is not None else None
    return RouterConfig(
        num_experts,
        attribute(block, family.top_k),
        score_func=cast(ScoreName, score),
        route_norm=bool(norm),
        route_scale=scale,
        num_expert_groups=count,
        num_limited_groups=kept,
        group_score_top_k=groups.best if groups else 2,
        dtype=dtype,
        bias=family.weight_bias is not None,
        logit_softcap=cap or None,
        norm_eps=family.norm_eps if norm else 0.0,
        choose_by=family.choose_by,
        excluded_score=family.excluded_score,
        input_dim=input_dim,
    )


def _left_over(family: Family, block: nn.Module, tensors: Sequence[Held]) -> str | None:
    """A parameter or buffer of the block that no tensor of ours holds."""
    known = {tensor.theirs for tensor in tensors}
    names = (name for name in block.state_dict() if name.partition(".")[0] not in family.kept)
    return next((name for name in names if name not in known), None)


def _our_shapes(
    block: nn.Module, tensors: Sequence[Held], experts: int
) -> dict[str, tuple[int, ...]]:
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


# --- scores and activations -------------------------------------------------------------------

SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus")
_SCORE_OF_CLASS = {
    "Sigmoid": "sigmoid",
    "SqrtSoftplusActivation": "sqrt_softplus",
}
_SCORE_OF_NAME = {  # of the logits of the chosen experts
    "softmax": "softmax_chosen",
    "sigmoid": "sigmoid",
}


def _score(value: object) -> str | None:
    """Our score for the name that a block has for it, or for the class of its function."""
    if isinstance(value, str):
        return _SCORE_OF_NAME.get(value)
    return _SCORE_OF_CLASS.get(type(value).__name__)


def _activation(family: Family, block: nn.Module) -> Activation | str:
    if family.activation is not None:
        return family.activation(block)
    experts = getattr(block, "experts", block)
    return of_function(function_of(experts), gated=family.layout is not UNGATED)


def _shared_activation(family: Family, block: nn.Module) -> Activation | str | None:
    shared = getattr(block, family.shared, None) if family.shared else None
    if shared is None:
        return None
    if family.shared_activation is not None:
        return family.shared_activation(block)
    return of_function(function_of(shared), gated=family.layout is not UNGATED)
