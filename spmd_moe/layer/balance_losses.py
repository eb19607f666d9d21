"""Balance loss (also called auxiliary loss) and z-loss, from sums over tokens.

Inside the layer there are only sums over this rank's tokens (`LossTerms`), each P on the token
axes. The products that make a loss of them need counts of the whole batch (`Totals`), which are
taken outside, once: the loss is again P, and summed over ranks it is what one process computes.

    f_e  share of the choices that fell on expert e    p_e  share of the probability that it got
    balance = sum over e of E * f_e * p_e              1 when all experts are used alike
    z       = mean of log(sum of exp(logits)) ** 2
"""

# Shape letters in this file:
#   T  tokens on this rank    K  experts per token    D  model width    E  experts
#   B  sequences, or 1 when the batch is balanced as one

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.export import register_dataclass

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.compute_dtype import no_autocast
from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import Axis, MoEMesh
from spmd_moe.core.placement import CP, DENSE, DP, TP, I, P, Placed, R, Tokens
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.validate import check_instance
from spmd_moe.layer.router import Routing, count_choices

# Said on cp, or on dp and cp, alone: what holds for both ways of balancing, and every boundary.
GroupSums: TypeAlias = Placed[Tensor, CP[P]]
GroupTotals: TypeAlias = Placed[Tensor, CP[R]]
Sums: TypeAlias = Placed[Tensor, DP[P], CP[P]]
BatchTotals: TypeAlias = Placed[Tensor, DP[R], CP[R]]


@final
@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over tokens from which the losses are computed; `MoEOutput.losses` has them.

    The sums are P on dp, cp and tp; I on tp if the model around the layer is I there. With
    `balance="sequence"`, all except `z_sum` are V on dp, whose ranks have different sequences.

    Attributes:
        prob_sums_BE: Sums of router probabilities, for each sequence (or the batch) and expert.
        counts_BE: Choices of each expert, int64.
        tokens_B: Tokens, int64.
        z_sum: Sum of the squared log-partition of the logits.
        by_sequence: Whether each sequence is balanced on its own.
        whole_on_tp: Whether the sums are already reduced over tp.

    Example:
        >>> import torch
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2), balance="batch"), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> layer(torch.ones(3, 8)).losses.tokens_B.tolist()
        [3]
    """

    prob_sums_BE: GroupSums
    counts_BE: GroupSums  # choices, int64
    tokens_B: GroupSums  # int64
    z_sum: Sums
    by_sequence: bool
    whole_on_tp: bool


@final
@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of a whole batch over all ranks, made by `reduce_loss_terms`.

    Attributes:
        counts_BE: Choices of each expert, for each sequence or for the batch.
        tokens_B: Tokens of each sequence, or of the batch.
        tokens: Tokens of the batch.
        groups: The number of balanced units: sequences, or batches.
        by_sequence: Whether each sequence is balanced on its own.

    Example:
        >>> import torch
        >>> from spmd_moe import reduce_loss_terms
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2), balance="batch"), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> int(reduce_loss_terms(layer(torch.ones(3, 8)).losses, mesh).tokens)
        3
    """

    counts_BE: GroupTotals
    tokens_B: GroupTotals
    tokens: BatchTotals
    groups: BatchTotals  # how many times something is balanced: sequences, or batches
    by_sequence: bool

    def __add__(self, other: Totals) -> Totals:
        """The counts of two micro-batches together, which are balanced as one."""
        if self.by_sequence or other.by_sequence:
            raise ConfigError(
                explain(
                    "Totals",
                    "totals of sequences are added",
                    why="sequence 0 of one micro-batch is not sequence 0 of another",
                    fixes=["merge_microbatches([first, second])   # each its own, divided by all"],
                )
            )
        return Totals(
            self.counts_BE + other.counts_BE,
            self.tokens_B + other.tokens_B,
            self.tokens + other.tokens,
            self.groups,
            by_sequence=False,
        )


# So that what looks for tensors in outputs (FSDP, torch.export, tree_map) finds them in these.
register_dataclass(LossTerms)
register_dataclass(Totals)


def loss_terms(
    routing: Routing, mesh: MoEMesh, group_T: Tokens | None, groups: int, mask_T: Tokens | None
) -> LossTerms:
    """This rank's sums. `group_T` is the sequence of each token; None balances the batch as one."""
    probs_TE, ids_TK = routing.probs_TE, routing.expert_ids_TK
    z_T = routing.logits_TE.logsumexp(1).square()
    valid_T = torch.ones_like(z_T)
    if mask_T is not None:
        valid_T = mask_T.to(z_T.dtype)
        z_T, probs_TE = z_T * valid_T, probs_TE * valid_T.unsqueeze(1)
    everywhere = [mesh[role] for role in DENSE]
    if group_T is None:
        axes, prob_sums_BE = everywhere, probs_TE.sum(0, keepdim=True)
        counts_BE, tokens_B = routing.counts_E.unsqueeze(0), valid_T.sum(0, keepdim=True)
    else:
        axes, num_experts = [mesh[CP], mesh[TP]], probs_TE.shape[1]
        # A product, not an index_add: that would add in any order.
        member_BT = group_T == torch.arange(groups, device=group_T.device).unsqueeze(1)
        with no_autocast(probs_TE):
            prob_sums_BE = member_BT.to(probs_TE.dtype) @ probs_TE
            tokens_B = member_BT.to(valid_T.dtype) @ valid_T
        ids = torch.where(ids_TK < 0, ids_TK, ids_TK + num_experts * group_T.unsqueeze(1))
        counts_BE = count_choices(ids, groups * num_experts).view(groups, num_experts)
    return LossTerms(
        prob_sums_BE=declare_sums(prob_sums_BE, axes),
        counts_BE=declare_sums(counts_BE, axes),
        tokens_B=declare_sums(tokens_B.to(torch.int64), axes),
        z_sum=declare_sums(z_T.sum(), everywhere),
        by_sequence=group_T is not None,
        whole_on_tp=False,
    )


def reduce_on_tp(terms: LossTerms, mesh: MoEMesh) -> LossTerms:
    """P to I on tp, for a model that computes the same on every rank of tp."""
    return LossTerms(
        _whole(terms.prob_sums_BE, mesh),
        _whole(terms.counts_BE, mesh),
        _whole(terms.tokens_B, mesh),
        _whole(terms.z_sum, mesh),
        terms.by_sequence,
        whole_on_tp=True,
    )


def _whole(x: Placed[Tensor, CP[P], TP[P]], mesh: MoEMesh) -> Placed[Tensor, CP[P], TP[I]]:
    # Waited for here: torch would never release the results of losses that are not used.
    whole: Placed[Tensor, TP[I]] = redistribute(x, mesh[TP], src=P, dst=I)
    return whole.clone()


def reduce_loss_terms(terms: LossTerms, mesh: MoEMesh) -> Totals:
    """Reduce the counts of one batch over all ranks, for `balance_loss` and `z_loss`.

    Every rank must call it. With gradient accumulation, pass the results of all micro-batches to
    `merge_microbatches`.

    Args:
        terms: `out.losses` of one forward.
        mesh: The mesh of the layer.

    Returns:
        The totals, the same on all ranks.

    Raises:
        ConfigError: `terms` is not a `LossTerms`; it is None if the layer has no `balance`.

    Example:
        >>> import torch
        >>> from spmd_moe import balance_loss, reduce_loss_terms
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2), balance="batch"), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> out = layer(torch.ones(3, 8))
        >>> loss = 0.01 * balance_loss(out.losses, reduce_loss_terms(out.losses, mesh), mesh)
    """
    _check_terms("reduce_loss_terms", terms)
    over_tp = [] if terms.whole_on_tp else [mesh[TP]]
    token_axes = [mesh[CP], *over_tp]
    sequence_axes = token_axes if terms.by_sequence else [mesh[DP], *token_axes]
    tokens_B: GroupTotals = sum_over(terms.tokens_B, sequence_axes)
    tokens: GroupTotals = tokens_B.sum()
    groups: GroupTotals = (tokens_B > 0).to(torch.int64).sum()  # a sequence of padding is none
    if terms.by_sequence:
        tokens = sum_over(declare_sum(tokens, mesh[DP]), [mesh[DP]])
        groups = sum_over(declare_sum(groups, mesh[DP]), [mesh[DP]])
    counts_BE: GroupTotals = sum_over(terms.counts_BE, sequence_axes)
    return Totals(counts_BE, tokens_B, tokens, groups, terms.by_sequence)


def merge_microbatches(parts: Sequence[Totals]) -> list[Totals]:
    """Convert the totals of micro-batches so that their losses sum to those of the full batch.

    Args:
        parts: The totals of each micro-batch.

    Returns:
        One `Totals` for each micro-batch, to be used in its place.

    Raises:
        ConfigError: The first totals are balanced by batch, and others by sequence.

    Example:
        >>> import torch
        >>> from spmd_moe import merge_microbatches, reduce_loss_terms
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2), balance="batch"), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> outs = [layer(torch.ones(rows, 8)) for rows in (3, 5)]
        >>> totals = merge_microbatches([reduce_loss_terms(out.losses, mesh) for out in outs])
        >>> [int(total.tokens) for total in totals]
        [8, 8]
    """
    if not parts:
        return []
    if not parts[0].by_sequence:
        return [sum(parts[1:], parts[0])] * len(parts)
    tokens: BatchTotals = torch.stack([part.tokens for part in parts]).sum()
    groups: BatchTotals = torch.stack([part.groups for part in parts]).sum()
    return [replace(part, tokens=tokens, groups=groups) for part in parts]


def balance_loss(terms: LossTerms, total: Totals, mesh: MoEMesh) -> Sums:
    """The balance loss: 1 for an even use of the experts, up to E if one is used alone.

    Args:
        terms: `out.losses` of one forward.
        total: What `reduce_loss_terms`, or `merge_microbatches`, returns for it.
        mesh: The mesh of the layer.

    Returns:
        The summand of this rank: P on the token axes. Add it to a loss that is P as well.

    Raises:
        ConfigError: An argument is of another type.

    Example:
        >>> import torch
        >>> from spmd_moe import balance_loss, reduce_loss_terms
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2), balance="batch"), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> out = layer(torch.ones(3, 8))
        >>> bool(balance_loss(out.losses, reduce_loss_terms(out.losses, mesh), mesh) > 0)
        True
    """
    _check_both("balance_loss", terms, total)
    num_experts = total.counts_BE.shape[1]
    choices_B1 = total.counts_BE.sum(1, keepdim=True).clamp(min=1)
    tokens_B1 = total.tokens_B.clamp(min=1).unsqueeze(1)
    # Cast first: a quotient of integers is float32, also if the probabilities are not.
    counts_BE = total.counts_BE.to(terms.prob_sums_BE.dtype)
    used_BE = num_experts * counts_BE / choices_B1 / tokens_B1
    loss = (used_BE * terms.prob_sums_BE).sum() / total.groups.clamp(min=1)
    return declare_sum(loss, mesh[DP]) if terms.by_sequence else loss


def z_loss(terms: LossTerms, total: Totals) -> Sums:
    """The mean squared log-partition of the router's logits, which keeps logits small.

    Args:
        terms: `out.losses` of one forward; requires `balance` in the config.
        total: What `reduce_loss_terms`, or `merge_microbatches`, returns for it.

    Returns:
        The summand of this rank: P on the token axes.

    Raises:
        ConfigError: An argument is of another type.

    Example:
        >>> import torch
        >>> from spmd_moe import reduce_loss_terms, z_loss
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2), balance="batch"), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> out = layer(torch.ones(3, 8))
        >>> bool(z_loss(out.losses, reduce_loss_terms(out.losses, mesh)) > 0)
        True
    """
    _check_both("z_loss", terms, total)
    return terms.z_sum / total.tokens.clamp(min=1)


# spmd: allow unknown - which axes is data
def declare_sums(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Sums over this rank's tokens as parts of sums over the tokens of all ranks."""
    total = x
    for axis in axes:
        total = declare_sum(total, axis)
    # A declaration is a view, and of views in a module's output FSDP warns; and backward needs `x`
    # unchanged, also if the caller changes his.
    return total.clone() if total is not x or torch.is_grad_enabled() else x


# spmd: allow unknown - which axes is data
def sum_over(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    for axis in axes:
        x = redistribute(x, axis, src=P, dst=R)
    return x


def _check_both(where: str, terms: object, total: object) -> None:
    _check_terms(where, terms)
    check_instance(where, "total", total, Totals, "reduce_loss_terms(out.losses, mesh)")


def _check_terms(where: str, terms: object) -> None:
    fix, why = "out.losses   # of out = layer(x)", ""
    if terms is None:
        fix = "MoEConfig(..., balance='batch')   # out.losses is None without it"
        why = "the layer makes sums for losses only where its balance is set"
    check_instance(where, "terms", terms, LossTerms, fix, why)
