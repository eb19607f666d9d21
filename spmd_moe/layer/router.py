"""Tokens to `Routing`: which experts each token goes to, and with what weight.

Weights come from the live scores, so gradients reach the router; a selection bias only chooses.
"""

# Shape letters in this file:
#   T  tokens    D  model width    E  experts    K  experts per token

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast, final

import torch
from torch import Tensor, nn

from spmd_moe.core.dtypes import as_dtype, sum_dtype
from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.host_reads import draw_seed
from spmd_moe.core.mesh import Axis, MoEMesh
from spmd_moe.core.placement import DENSE, TP, I, R, RouterWeight, Tokens, TokenSums, Whole
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.validate import check_instance, check_number, check_one_of, check_positive_ints
from spmd_moe.layer import routing_faults
from spmd_moe.layer.router_logits import mask_rows, router_logits
from spmd_moe.layer.router_scores import LOG_OF_NONE, SCORES, ScoreName
from spmd_moe.layer.routing_faults import nan_parameter

T = TypeVar("T", bound=Tensor)


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

    def __post_init__(self) -> None:
        e, k, g, kept = (
            self.num_experts,
            self.top_k,
            self.num_expert_groups,
            self.num_limited_groups,
        )
        where, best = "RouterConfig", self.group_score_top_k
        check_positive_ints(
            where,
            num_experts=e,
            top_k=k,
            num_expert_groups=g,
            num_limited_groups=kept,
            group_score_top_k=best,
        )
        check_one_of(where, "score_func", self.score_func, SCORES)
        for name in ("route_norm", "force_balance", "bias"):
            check_instance(where, name, getattr(self, name), bool, f"{name}=True")
        if k > e:
            _refuse(
                f"top_k is {k}, of {e} experts",
                "a token chooses at least one and at most all of them",
                f"top_k={e}",
            )
        if k == 1 and (self.route_norm or self.score_func == "softmax_chosen"):
            _refuse(
                f"top_k is 1, score_func {self.score_func!r}, route_norm {self.route_norm}",
                "one weight, normalized, is always 1, so no gradient would reach the router",
                "score_func='softmax', route_norm=False",
            )
        if e % g:
            divisors = (d for d in range(1, e + 1) if e % d == 0)
            _refuse(
                f"{e} experts are in {g} groups",
                "groups are equal in size",
                f"num_expert_groups={min(divisors, key=lambda d: abs(d - g))}",
            )
        two = "a group is as good as its best expert or its best two"
        check_one_of(where, "group_score_top_k", best, (2, 1), two)
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
        if self.dtype not in (torch.float32, torch.float64):
            _refuse(f"dtype is {self.dtype}", "a gate is exponentials", "dtype=torch.float32")
        check_number(
            where,
            "route_scale",
            self.route_scale,
            lambda scale: 0.0 < scale < math.inf,
            need="a finite number above 0",
            why="all weights are multiplied by it",
            fix="route_scale=1.0",
        )
        check_number(
            where,
            "jitter",
            self.jitter,
            lambda jitter: 0.0 <= jitter < 1.0,
            need="a number from 0 to below 1",
            why="inputs are scaled by 1 -+ jitter",
            fix="jitter=0.01",
        )


def _refuse(what: str, why: str, fix: str) -> None:
    raise ConfigError(explain("RouterConfig", what, why=why, fixes=[fix]))


@final
@dataclass(frozen=True, slots=True)
class Routing:
    """The choices of this rank's tokens, as the router returns them.

    Attributes:
        expert_ids_TK: int64, the chosen experts of each token; -1 for none.
        scores_TK: The weights of the choices.
        logits_TE: The logits.
        probs_TE: The probabilities that the balance loss uses.
        counts_E: int64, choices of each expert.
        dropped: int64, choices of no expert, except those of masked tokens.
        fault: A mark of what is wrong with this rank's scores or ids; it travels with the counts.
        complete: Whether every choice has an expert.

    Example:
        >>> import torch
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> seen = []
        >>> handle = layer.router.register_forward_hook(lambda module, args, out: seen.append(out))
        >>> _ = layer(torch.ones(3, 8))
        >>> tuple(seen[0].expert_ids_TK.shape)
        (3, 2)
    """

    expert_ids_TK: Tokens  # int64; -1 is a choice of no expert
    scores_TK: Tokens  # the weight of each choice
    logits_TE: Tokens
    probs_TE: Tokens  # the scores as shares of 1, for the balance loss
    counts_E: Tokens  # int64: how many of this rank's choices fell on each expert
    dropped: Tokens  # int64: how many, of tokens that are not masked, fell on none
    fault: Tokens  # int64: not 0 where scores or ids are unusable; see routing_faults.py
    complete: bool  # every choice has an expert


@final
class Router(nn.Module):
    """The gate, and how its scores become choices and weights."""

    weight_ED: RouterWeight
    b_E: RouterWeight | None  # learned, a part of the logits
    bias_E: Whole  # steers the choice, not the weight; see losses.update_selection_bias
    seen_E: TokenSums  # choices of this rank's tokens since the bias was last updated

    def __init__(
        self, config: RouterConfig, dim: int, mesh: MoEMesh, *, tell: Sequence[Axis] = ()
    ) -> None:
        """`tell`: what is wrong on one rank of these axes is wrong on all of them."""
        super().__init__()
        self.config, self.tp, self.tell = config, mesh[TP], list(tell)
        self.score = SCORES[config.score_func]
        place, places = _place(mesh)
        first = first_in_turn(place, places, config.num_experts)
        self.choose: Choose = _InTurn(first) if config.force_balance else _best
        self.jitter = _Jitter(config.jitter, place)
        self.weight_ED = nan_parameter(config.num_experts, dim)
        self.b_E = nan_parameter(config.num_experts) if config.bias else None
        self.register_buffer("bias_E", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("seen_E", torch.zeros(config.num_experts, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """A cast of the model leaves the selection bias alone: small steps are lost in bfloat16."""
        bias_E = self.bias_E
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch
        if self.bias_E.dtype is not bias_E.dtype:
            self.bias_E = bias_E.to(self.bias_E.device)
        return self

    def forward(
        self,
        x_TD: Tokens,
        mask_T: Tokens | None = None,
        expert_ids_TK: Tokens | None = None,
        *,
        refused: bool = False,
    ) -> Routing:
        """Route. Tokens whose mask is False choose no expert; ids that are given are the choice.

        `refused`: this rank was given what the layer cannot take, and stands here with no tokens.
        """
        config = self.config
        weight_ED: Whole = redistribute(
            self.weight_ED, self.tp, src=I, dst=R, grad_dtype=sum_dtype(self.weight_ED)
        )
        x_TD = self.jitter(x_TD) if self.training else x_TD
        logits_TE = router_logits(x_TD, weight_ED, mask_T, config.dtype)
        if self.b_E is not None:
            logits_TE = self._add_bias(logits_TE, self.b_E, mask_T)
        scores_TE = self.score.of_logits(logits_TE)
        complete = mask_T is None and expert_ids_TK is None
        if expert_ids_TK is None:
            marked = routing_faults.mark_faults(logits_TE, None)
            ids_TK = _of_tokens(self.choose(scores_TE, self.bias_E, config, mask_T), mask_T)
            dropped = torch.zeros_like(marked)
        else:
            given_TK = _of_tokens(expert_ids_TK, mask_T)
            marked = routing_faults.mark_faults(logits_TE, given_TK)
            ids_TK, dropped = _given(given_TK, mask_T, config.num_experts)
        if refused:
            marked = marked + routing_faults.REFUSED
        for axis in self.tell:
            marked = routing_faults.sum_marks(marked, axis)
        none_TK = None if complete else ids_TK < 0
        return Routing(
            expert_ids_TK=ids_TK,
            scores_TK=self._weights(scores_TE, logits_TE, ids_TK, none_TK),
            logits_TE=logits_TE,
            probs_TE=self._probs(scores_TE, logits_TE),
            counts_E=count_choices(ids_TK, config.num_experts, complete),
            dropped=dropped,
            fault=marked,
            complete=complete,
        )

    def _add_bias(self, logits_TE: Tokens, b_E: RouterWeight, mask_T: Tokens | None) -> Tokens:
        whole_E: Whole = redistribute(b_E, self.tp, src=I, dst=R, grad_dtype=sum_dtype(b_E))
        return mask_rows(logits_TE + as_dtype(whole_E, self.config.dtype), mask_T)

    def _weights(
        self, scores_TE: Tokens, logits_TE: Tokens, ids_TK: Tokens, none_TK: Tokens | None
    ) -> Tokens:
        """The weights of the choices; 0 where there is no expert, in values and gradients."""
        config, score = self.config, self.score
        real_TK = ids_TK if none_TK is None else ids_TK.clamp(min=0)
        if config.route_norm or score.normalized:
            logs_TK = score.log(logits_TE.gather(1, real_TK))
            if none_TK is not None:
                logs_TK = logs_TK.masked_fill(none_TK, LOG_OF_NONE)
            weights_TK = logs_TK.softmax(1)
        else:
            weights_TK = scores_TE.gather(1, real_TK)
        if none_TK is not None:
            weights_TK = weights_TK.masked_fill(none_TK, 0.0)
        return weights_TK if config.route_scale == 1.0 else weights_TK * config.route_scale

    def _probs(self, scores_TE: Tokens, logits_TE: Tokens) -> Tokens:
        """The scores as shares of 1."""
        return scores_TE if self.score.is_probs else self.score.log(logits_TE).softmax(1)


def _place(mesh: MoEMesh) -> tuple[int, int]:
    """This rank's number among all that have tokens of their own, and how many these are."""
    place, places = 0, 1
    for axis in (mesh[role] for role in DENSE):
        place, places = place * axis.size + axis.rank, places * axis.size
    return place, places


def _of_tokens(expert_ids_TK: Tokens, mask_T: Tokens | None) -> Tokens:
    """No expert for padding."""
    return expert_ids_TK if mask_T is None else expert_ids_TK.masked_fill(~mask_T.unsqueeze(1), -1)


def _given(expert_ids_TK: Tokens, mask_T: Tokens | None, num_experts: int) -> tuple[Tokens, Tokens]:
    """Ids from outside, those of no expert as -1; and how many of these there are."""
    none_TK = (expert_ids_TK < 0) | (expert_ids_TK >= num_experts)
    counted_TK = none_TK if mask_T is None else none_TK & mask_T.unsqueeze(1)
    return expert_ids_TK.masked_fill(none_TK, -1), counted_TK.sum()


def count_choices(expert_ids_TK: T, num_experts: int, complete: bool = False) -> T:
    """How many choices fell on each expert (`complete`: all did); of the kind that the ids have."""
    ids = expert_ids_TK.flatten()
    if complete:
        return cast(T, _bins(ids, num_experts))
    # -1, no expert, has the bin before all others.
    return cast(T, _bins(ids + 1, 1 + num_experts).narrow(0, 1, num_experts))


def _bins(numbers: T, how_many: int) -> T:
    none = numbers.new_zeros(how_many)
    return cast(T, none.scatter_add(0, numbers, torch.ones_like(numbers)))


# --- choices ----------------------------------------------------------------------------------

Choose: TypeAlias = Callable[[Tokens, Whole, RouterConfig, Tokens | None], Tokens]


def _best(scores_TE: Tokens, bias_E: Whole, config: RouterConfig, mask_T: Tokens | None) -> Tokens:
    """The experts of highest biased score, among the groups of highest biased score."""
    rank_TE = scores_TE + bias_E
    if config.num_limited_groups < config.num_expert_groups:
        rank_TE = _within_best_groups(rank_TE, config)
    return rank_TE.topk(config.top_k, dim=1).indices


def _within_best_groups(rank_TE: Tokens, config: RouterConfig) -> Tokens:
    """-inf for the experts of every group that a token does not keep."""
    per_group = config.num_experts // config.num_expert_groups
    grouped: Tokens = rank_TE.unflatten(1, (config.num_expert_groups, per_group))
    best = grouped.topk(min(config.group_score_top_k, per_group), dim=2).values.sum(2)
    kept = best.topk(config.num_limited_groups, dim=1).indices
    dropped = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(2), -math.inf).flatten(1)


@final
class _InTurn:
    """Experts round-robin; the scores are ignored."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(
        self, scores_TE: Tokens, bias_E: Whole, config: RouterConfig, mask_T: Tokens | None
    ) -> Tokens:
        # Counted out of the scores, so that the choices are of the kind that these are.
        one_T = torch.ones_like(scores_TE.select(1, 0), dtype=torch.int64)
        token_T = (one_T if mask_T is None else one_T * mask_T).cumsum(0) - 1
        choice_K = torch.arange(self.first, self.first + config.top_k, device=scores_TE.device)
        return (token_T.unsqueeze(1) * config.top_k + choice_K) % config.num_experts


def first_in_turn(place: int, places: int, num_experts: int) -> int:
    """The expert that a rank begins with, so that ranks with few tokens together use all."""
    return num_experts * place // places


# --- noise ------------------------------------------------------------------------------------


@final
class _Jitter:
    """Scales inputs by 1 -+ amount. Tokens are V on the dense axes, so each rank has its stream.

    What all streams start from is drawn from torch's default generator, whose state checkpointing
    restores: a forward that is computed again sees the same noise.
    """

    def __init__(self, amount: float, stream: int) -> None:
        self.amount, self.stream = amount, stream

    def __call__(self, x_TD: Tokens) -> Tokens:
        if not self.amount:
            return x_TD
        seed = draw_seed() + self.stream
        # Not in the dtype of the model: below float32 there are a few numbers around 1, or none.
        noise = torch.empty_like(x_TD, dtype=sum_dtype(x_TD)).uniform_(
            1 - self.amount,
            1 + self.amount,
            generator=torch.Generator(x_TD.device).manual_seed(seed),
        )
        return x_TD * noise
