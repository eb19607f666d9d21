"""The router's settings, and checks for contradictions."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, final

import torch

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.validate import check_instance, check_number, check_one_of, check_positive_ints
from spmd_moe.layer.router_scores import RANKS, SCORES, RankName, ScoreName


@final
@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How tokens choose experts.

    Args:
        num_experts: The number of experts of the layer.
        top_k: The number of experts of each token.
        score_func: `"softmax"` over all experts, `"softmax_chosen"` over the chosen ones,
            `"sigmoid"`, or `"sqrt_softplus"`.
        route_norm: Whether the chosen scores are normalized to a sum of 1.
        route_scale: A factor on the weights.
        num_expert_groups: The number of groups of experts, for group-limited routing.
        num_limited_groups: The number of groups that a token may use.
        group_score_top_k: How many of the best scores in a group are summed to rank it.
        dtype: Dtype of the router's matmul and of the loss terms.
        jitter: Multiplicative noise on the input during training, from 1 - jitter to 1 + jitter.
        force_balance: Ignore the scores and assign experts round-robin, with a different first
            expert on each rank (benchmarks only).
        bias: Whether a learned bias is added to the logits.
        logit_softcap: A bound of the logits: `cap * tanh(logits / cap)`. Default: no bound.
        norm_eps: A number that is added to the divisor of `route_norm`.
        choose_by: The score that ranks experts: `"logits"` or a score function.
            Default: the score that weighs them.
        excluded_score: The score of the experts in groups that a token does not use. Some
            checkpoints have 0.0, which is above a negative score.
        expert_scale: Whether a learned factor of each expert is multiplied with its weights.
        num_zero_experts: The number of identity experts, which return their input. Their ids follow
            those of the experts.
        input_dim: The width of a separate router input, `router_input`, that each call passes.
            Default: the router reads the input of the experts.
        given: Whether each call passes `expert_ids` and `expert_weights`. The router then has no
            parameters.
        in_model_dtype: Whether the matmul is computed in the dtype of the tokens, as transformers
            does; with `bias`, the sum is rounded to that dtype, once. In bfloat16 a few percent of
            tokens then choose other experts.

    Raises:
        ConfigError: Values contradict each other, with the nearest legal value.

    Example:
        >>> from spmd_moe import RouterConfig
        >>> config = RouterConfig(num_experts=8, top_k=2, score_func="sigmoid", route_norm=True)
    """

    num_experts: int
    top_k: int
    score_func: ScoreName = "softmax"
    route_norm: bool = False
    route_scale: float = 1.0
    num_expert_groups: int = 1
    num_limited_groups: int = 1
    group_score_top_k: Literal[1, 2] = 2
    dtype: torch.dtype = torch.float32
    jitter: float = 0.0
    force_balance: bool = False
    bias: bool = False
    logit_softcap: float | None = None
    norm_eps: float = 0.0
    choose_by: RankName | None = None
    excluded_score: float = -math.inf
    expert_scale: bool = False
    num_zero_experts: int = 0
    input_dim: int | None = None
    given: bool = False
    in_model_dtype: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_choices(self)
        _check_numbers(self)
        if self.given:
            _check_given(self)

    @property
    def num_choices(self) -> int:
        """The number of experts that a token chooses from, identity experts included."""
        return self.num_experts + self.num_zero_experts


def _check_kinds(config: RouterConfig) -> None:
    where = "RouterConfig"
    check_positive_ints(
        where,
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_expert_groups=config.num_expert_groups,
        num_limited_groups=config.num_limited_groups,
        group_score_top_k=config.group_score_top_k,
    )
    if config.input_dim is not None:
        check_positive_ints(where, input_dim=config.input_dim)
    if config.num_zero_experts != 0:
        check_positive_ints(where, num_zero_experts=config.num_zero_experts)
    check_one_of(where, "score_func", config.score_func, SCORES)
    check_one_of(where, "choose_by", config.choose_by, (*RANKS, None))
    flags = "route_norm", "force_balance", "bias", "expert_scale", "given", "in_model_dtype"
    for name in flags:
        check_instance(where, name, getattr(config, name), bool, f"{name}=True")
    two = "a group is as good as its best expert or its best two"
    check_one_of(where, "group_score_top_k", config.group_score_top_k, (2, 1), two)
    if config.dtype not in (torch.float32, torch.float64):
        _refuse(
            f"dtype is {config.dtype}",
            "scores need float32 or wider",
            "dtype=torch.float32",
        )


def _check_choices(config: RouterConfig) -> None:
    e, k, g, kept = (
        config.num_choices,
        config.top_k,
        config.num_expert_groups,
        config.num_limited_groups,
    )
    if k > e:
        _refuse(
            f"top_k is {k}, of {e} experts",
            "a token chooses at least one and at most all of them",
            f"top_k={e}",
        )
    if k == 1 and (config.route_norm or config.score_func == "softmax_chosen"):
        _refuse(
            f"top_k is 1, score_func {config.score_func!r}, route_norm {config.route_norm}",
            "one weight, normalized, is always 1, so no gradient would reach the router",
            "score_func='softmax', route_norm=False",
        )
    if config.num_zero_experts and g > 1:
        _refuse(
            f"{config.num_zero_experts} identity experts, and {g} groups of experts",
            "an identity expert is in no group",
            "num_expert_groups=1",
        )
    if e % g:
        divisors = (d for d in range(1, e + 1) if e % d == 0)
        _refuse(
            f"{e} experts are in {g} groups",
            "groups are equal in size",
            f"num_expert_groups={min(divisors, key=lambda d: abs(d - g))}",
        )
    if kept > g:
        _refuse(
            f"num_limited_groups is {kept}, of {g} groups",
            "a token keeps at least one and at most all of them",
            f"num_limited_groups={g}",
        )
    if k > kept * (e // g):
        _refuse(
            f"top_k is {k}, but {kept} of {g} groups have {kept * (e // g)} experts",
            "a token chooses among the experts of the groups it keeps",
            f"num_limited_groups={math.ceil(k / (e // g))}",
        )


def _check_numbers(config: RouterConfig) -> None:
    where = "RouterConfig"
    check_number(
        where,
        "route_scale",
        config.route_scale,
        lambda scale: 0.0 < scale < math.inf,
        need="a finite number above 0",
        why="all weights are multiplied by it",
        fix="route_scale=1.0",
    )
    check_number(
        where,
        "jitter",
        config.jitter,
        lambda jitter: 0.0 <= jitter < 1.0,
        need="a number from 0 to below 1",
        why="inputs are scaled by 1 -+ jitter",
        fix="jitter=0.01",
    )
    if config.logit_softcap is not None:
        check_number(
            where,
            "logit_softcap",
            config.logit_softcap,
            lambda cap: 0.0 < cap < math.inf,
            need="a finite number above 0, or None",
            why="it is the bound of the logits",
            fix="logit_softcap=30.0",
        )
    check_number(
        where,
        "norm_eps",
        config.norm_eps,
        lambda eps: 0.0 <= eps < math.inf,
        need="a finite number of 0 or more",
        why="it is added to a divisor",
        fix="norm_eps=1e-20",
    )
    if config.norm_eps and not (config.route_norm and config.score_func != "softmax_chosen"):
        _refuse(
            f"norm_eps is {config.norm_eps}, route_norm {config.route_norm}, "
            f"score_func {config.score_func!r}",
            "it is added to the divisor of route_norm, and softmax_chosen has another divisor",
            "norm_eps=0.0",
            "route_norm=True, score_func='sigmoid'",
        )
    check_number(
        where,
        "excluded_score",
        config.excluded_score,
        lambda score: score < math.inf,
        need="a finite number or -inf",
        why="experts of groups that are not used are ranked by it",
        fix="excluded_score=0.0",
    )


def _check_given(config: RouterConfig) -> None:
    """If the caller passes choices and weights, the settings that affect them must be defaults."""
    free = ("num_experts", "top_k", "dtype", "given")
    for field in fields(config):
        if field.name not in free and getattr(config, field.name) != field.default:
            _refuse(
                f"given is True, and {field.name} is {getattr(config, field.name)!r}",
                "a router that is given ids and weights computes neither logits nor scores",
                f"{field.name}={field.default!r}",
            )


def _refuse(what: str, why: str, *fixes: str) -> None:
    raise ConfigError(explain("RouterConfig", what, why=why, fixes=fixes))
