"""Tokens to `Routing`: which experts each token goes to, and with what weight.

Weights come from the live scores, so gradients reach the router; a selection bias only chooses.
"""

# Shape letters in this file:
#   T  tokens    D  width of the router's input    E  experts    K  experts per token

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast, final

import torch
from torch import Tensor, nn

from spmd_moe.core.compute_dtype import as_dtype, sum_dtype
from spmd_moe.core.mesh import Axis, MoEMesh
from spmd_moe.core.placement import DENSE, TP, I, R, RouterWeight, Tokens, TokenSums, Whole
from spmd_moe.core.redistribute import redistribute
from spmd_moe.layer import routing_faults
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.layer.router_logits import mask_rows, router_logits
from spmd_moe.layer.router_noise import Jitter
from spmd_moe.layer.router_scores import LOG_OF_NONE, RANKS, SCORES
from spmd_moe.layer.routing_faults import nan_parameter

T = TypeVar("T", bound=Tensor)


@final
@dataclass(frozen=True, slots=True)
class IdentityChoices:
    """The contribution of identity experts: each token's own input, times a weight.

    Attributes:
        weights_T: The sum of the weights of each token's choices of identity experts.
        counts_E: int64, choices of each expert, and behind them of each identity expert.

    Example:
        >>> import torch
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> router = RouterConfig(4, top_k=2, num_zero_experts=2)
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, router), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> tuple(layer(torch.ones(3, 8)).counts_E.shape)
        (6,)
    """

    weights_T: Tokens
    counts_E: Tokens


@final
@dataclass(frozen=True, slots=True)
class Routing:
    """The choices of this rank's tokens, as the router returns them.

    Attributes:
        expert_ids_TK: int64, the chosen experts of each token; -1 for none.
        scores_TK: The weights of the choices.
        logits_TE: The logits; of no expert, `[T, 0]`, if the router is given ids and weights.
        probs_TE: The probabilities that the balance loss uses; `[T, 0]` as well.
        counts_E: int64, choices of each expert.
        dropped: int64, choices of no expert, except those of masked tokens.
        fault: A mark of what is wrong with this rank's scores or ids; it travels with the counts.
        complete: Whether every choice has an expert.
        identity: The choices of identity experts, if the layer has these.

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
    identity: IdentityChoices | None = None


@final
class Router(nn.Module):
    """The gate, and how its scores become choices and weights."""

    weight_ED: RouterWeight  # None, and not read, in a router that is given ids and weights
    b_E: RouterWeight | None  # learned, a part of the logits
    scale_E: RouterWeight | None  # learned, a factor of the weights
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
        first, choices = first_in_turn(place, places, config.num_experts), config.num_choices
        self.choose: Choose = _InTurn(first) if config.force_balance else _best
        self.jitter = Jitter(config.jitter, place)
        if config.given:
            self.register_parameter("weight_ED", None)
        else:
            self.weight_ED = nan_parameter(choices, config.input_dim or dim)
        self.b_E = nan_parameter(choices) if config.bias else None
        self.scale_E = nan_parameter(choices) if config.expert_scale else None
        self.register_buffer("bias_E", torch.zeros(choices, dtype=torch.float32))
        self.register_buffer("seen_E", torch.zeros(choices, dtype=torch.int64))

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
        expert_weights_TK: Tokens | None = None,
        *,
        refused: bool = False,
    ) -> Routing:
        """Route. Tokens whose mask is False choose no expert; ids that are given are the choice.

        `refused`: this rank was given what the layer cannot take, and stands here with no tokens.
        """
        config = self.config
        if config.given:
            return self._as_given(x_TD, mask_T, expert_ids_TK, expert_weights_TK, refused)
        weight_ED: Whole = redistribute(
            self.weight_ED, self.tp, src=I, dst=R, grad_dtype=sum_dtype(self.weight_ED)
        )
        x_TD = self.jitter(x_TD) if self.training else x_TD
        in_model_dtype = config.in_model_dtype and self.b_E is None  # else the sum is rounded
        product_dtype = x_TD.dtype if in_model_dtype else config.dtype
        logits_TE = router_logits(x_TD, weight_ED, mask_T, product_dtype, config.dtype)
        if self.b_E is not None:
            logits_TE = self._add_bias(logits_TE, self.b_E, mask_T)
            if config.in_model_dtype:
                logits_TE = as_dtype(as_dtype(logits_TE, x_TD.dtype), config.dtype)
        if config.logit_softcap is not None:
            logits_TE = torch.tanh(logits_TE / config.logit_softcap) * config.logit_softcap
        scores_TE = self.score.of_logits(logits_TE)
        complete = mask_T is None and expert_ids_TK is None
        if expert_ids_TK is None:
            marked = routing_faults.mark_faults(logits_TE, None, config.num_choices)
            rank_TE = scores_TE if config.choose_by is None else RANKS[config.choose_by](logits_TE)
            ids_TK = _of_tokens(self.choose(rank_TE, self.bias_E, config, mask_T), mask_T)
            dropped = torch.zeros_like(marked)
        else:
            given_TK = _of_tokens(expert_ids_TK, mask_T)
            marked = routing_faults.mark_faults(logits_TE, given_TK, config.num_choices)
            ids_TK, dropped = _given(given_TK, mask_T, config.num_choices)
        none_TK = None if complete else ids_TK < 0
        weights_TK = self._weights(scores_TE, logits_TE, ids_TK, none_TK)
        counts_E, identity = count_choices(ids_TK, config.num_choices, complete), None
        if config.num_zero_experts:
            # Dispatchers and experts treat a choice of an identity expert as no expert.
            identity_TK, complete = ids_TK >= config.num_experts, False
            weights_T = weights_TK.masked_fill(~identity_TK, 0.0).sum(1)
            identity = IdentityChoices(weights_T, counts_E)
            ids_TK = ids_TK.masked_fill(identity_TK, -1)
            weights_TK = weights_TK.masked_fill(identity_TK, 0.0)
            counts_E = counts_E.narrow(0, 0, config.num_experts).contiguous()
        return Routing(
            expert_ids_TK=ids_TK,
            scores_TK=weights_TK,
            logits_TE=logits_TE,
            probs_TE=self._probs(scores_TE, logits_TE),
            counts_E=counts_E,
            dropped=dropped,
            fault=self._told(marked, refused),
            complete=complete,
            identity=identity,
        )

    def _as_given(
        self,
        x_TD: Tokens,
        mask_T: Tokens | None,
        expert_ids_TK: Tokens | None,
        expert_weights_TK: Tokens | None,
        refused: bool,
    ) -> Routing:
        """The routing made of the choices and weights that the caller passes."""
        config = self.config
        if expert_ids_TK is None or expert_weights_TK is None:  # refused: there are no tokens
            expert_weights_TK = x_TD.narrow(1, 0, 1).expand(-1, config.top_k)
            expert_ids_TK = expert_weights_TK.to(torch.int64)
        given_TK = _of_tokens(expert_ids_TK, mask_T)
        weights_TK = as_dtype(mask_rows(expert_weights_TK, mask_T), config.dtype)
        marked = routing_faults.mark_faults(weights_TK, given_TK, config.num_experts)
        ids_TK, dropped = _given(given_TK, mask_T, config.num_experts)
        none_TE = weights_TK.narrow(1, 0, 0)
        return Routing(
            expert_ids_TK=ids_TK,
            scores_TK=weights_TK.masked_fill(ids_TK < 0, 0.0),
            logits_TE=none_TE,
            probs_TE=none_TE,
            counts_E=count_choices(ids_TK, config.num_experts),
            dropped=dropped,
            fault=self._told(marked, refused),
            complete=False,
        )

    def _told(self, marked: Tokens, refused: bool) -> Tokens:
        """The faults of this rank, summed with those of the ranks on the axes in `tell`."""
        if refused:
            marked = marked + routing_faults.REFUSED
        for axis in self.tell:
            marked = routing_faults.sum_marks(marked, axis)
        return marked

    def _add_bias(self, logits_TE: Tokens, b_E: RouterWeight, mask_T: Tokens | None) -> Tokens:
        return mask_rows(logits_TE + self._whole(b_E), mask_T)

    def _whole(self, x_E: RouterWeight) -> Whole:
        whole_E: Whole = redistribute(x_E, self.tp, src=I, dst=R, grad_dtype=sum_dtype(x_E))
        return as_dtype(whole_E, self.config.dtype)

    def _weights(
        self, scores_TE: Tokens, logits_TE: Tokens, ids_TK: Tokens, none_TK: Tokens | None
    ) -> Tokens:
        """The weights of the choices; 0 where there is no expert, in values and gradients."""
        config, score = self.config, self.score
        real_TK = ids_TK if none_TK is None else ids_TK.clamp(min=0)
        if config.norm_eps:
            weights_TK = scores_TE.gather(1, real_TK)
            if none_TK is not None:
                weights_TK = weights_TK.masked_fill(none_TK, 0.0)
            weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + config.norm_eps)
        elif config.route_norm or score.normalized:
            logs_TK = score.log(logits_TE.gather(1, real_TK))
            if none_TK is not None:
                logs_TK = logs_TK.masked_fill(none_TK, LOG_OF_NONE)
            weights_TK = logs_TK.softmax(1)
        else:
            weights_TK = scores_TE.gather(1, real_TK)
        if self.scale_E is not None:
            scale_E = self._whole(self.scale_E)
            weights_TK = weights_TK * (torch.ones_like(scores_TE) * scale_E).gather(1, real_TK)
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
    """Replace the scores of experts in groups that a token does not use."""
    per_group = config.num_experts // config.num_expert_groups
    grouped: Tokens = rank_TE.unflatten(1, (config.num_expert_groups, per_group))
    best = grouped.topk(min(config.group_score_top_k, per_group), dim=2).values.sum(2)
    kept = best.topk(config.num_limited_groups, dim=1).indices
    dropped = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(2), config.excluded_score).flatten(1)


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
