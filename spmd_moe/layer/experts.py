"""The experts of one rank: a feed-forward network per expert, over rows sorted by expert.

    x_RD     e0 e0 e0 | e2 | e3 e3        rows at this rank's experts
    counts_e 3, 0, 1, 2

Rows come whole to every rank of etp, each of which has a slice of every expert's hidden dim, so
what comes out is a part of a sum on etp. The router's weight scales a row between the two matmuls,
where it is linear: then no expert's output has to be kept for backward.
"""

# Shape letters in this file:
#   T  tokens on this rank     R  rows at this rank's experts, sorted by expert
#   D  model width             F  hidden width of an expert, on this rank
#   K  experts per token       e  experts on this rank

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, final

import torch
from spmd_types import register_local_autograd_function
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.dtypes import as_dtype, dtypes_match, matmul_dtype, no_autocast
from spmd_moe.core.errors import DtypeError, ShapeError, describe, explain, plural
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import (
    EP,
    ETP,
    ExpertHiddenBias,
    ExpertInWeight,
    ExpertOutBias,
    ExpertOutWeight,
    GatheredRows,
    I,
    P,
    Rows,
    RowSums,
)
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.validate import split_evenly
from spmd_moe.layer import per_expert
from spmd_moe.layer.activations import Activation
from spmd_moe.layer.grouped_ffn import (
    Call,
    Gradients,
    Hidden,
    Needs,
    Weights,
    gradients,
    hidden,
    output,
)
from spmd_moe.layer.grouped_matmul import AllExperts, Matmul, PerExpert, choose_matmul
from spmd_moe.layer.permute import Gather, add_rows
from spmd_moe.layer.routing_faults import nan_parameter


class ScoreApplication(Enum):
    """Where a row is multiplied by the router's weight."""

    BEFORE_SECOND_MATMUL = "before the second matmul"
    """The row's output is never needed again, so it is not kept for backward."""
    IN_COMBINE = "in combine"
    """As some checkpoints demand; keeps the output for the weights' gradient."""


class ExpertRecompute(Enum):
    """What backward recomputes instead of saving it in forward."""

    NONE = "none"
    """The results of the first matmuls are saved."""
    FIRST_MATMULS = "first matmuls"
    """Backward computes the first matmuls again."""


class Recipe(NamedTuple):
    """How to compute: settled before the first call."""

    activation: Activation
    matmul: Matmul
    recompute: ExpertRecompute
    padded: bool
    """Behind the rows of all experts there may be rows of none."""
    compute: torch.dtype
    """What rows and weights are taken to for the matmuls."""


@final
class Experts(nn.Module):
    """This rank's experts, and on etp its slice of each.

    w1 and w3 (gate and up) are tensors of their own: fused into one, a shard of the hidden dim
    would hold a part of gate only. `matmul` overrides what is chosen for the dtype and device.
    """

    w1_eFD: ExpertInWeight
    w3_eFD: ExpertInWeight | None
    w2_eDF: ExpertOutWeight
    b1_eF: ExpertHiddenBias | None
    b3_eF: ExpertHiddenBias | None
    b2_eD: ExpertOutBias | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        mesh: MoEMesh,
        *,
        activation: Activation,
        bias: bool,
        recompute: ExpertRecompute,
        matmul: Matmul | None = None,
    ) -> None:
        super().__init__()
        self.etp, self.activation, self.recompute, self.matmul = (
            mesh[ETP],
            activation,
            recompute,
            matmul,
        )
        e = split_evenly("Experts", "num_experts", num_experts, mesh[EP])
        F = split_evenly("Experts", "hidden_dim", hidden_dim, self.etp)

        self.w1_eFD, self.w2_eDF = nan_parameter(e, F, dim), nan_parameter(e, dim, F)
        self.w3_eFD = nan_parameter(e, F, dim) if activation.gated else None
        self.b1_eF = nan_parameter(e, F) if bias else None
        self.b3_eF = nan_parameter(e, F) if bias and activation.gated else None
        self.b2_eD = nan_parameter(e, dim) if bias else None

    def forward(
        self,
        x_RD: GatheredRows,
        counts_e: GatheredRows,
        scores_R: GatheredRows | None = None,
        gather: Gather | None = None,
        padded: bool = False,
    ) -> RowSums:
        """`y_RD`. With `gather`, the first argument is tokens, and row r is token `token_R[r]`.

        `padded`: shapes are fixed, and rows past the counts' sum are no expert's; they become 0.
        """
        w = Weights(self.w1_eFD, self.w2_eDF, self.w3_eFD, self.b1_eF, self.b3_eF)
        activation, matmul = self.activation, self.matmul
        part_RD: Rows = experts_ffn(
            x_RD, counts_e, w, scores_R, gather, activation, matmul, self.recompute, padded
        )
        y_RD = declare_sum(part_RD, self.etp)  # each rank of etp has summed over its slice
        if self.b2_eD is None:
            return y_RD
        # Added by one rank of etp: a sum over etp would add it once for each.
        b2_eD = redistribute(self.b2_eD, self.etp, src=I, dst=P)
        mine_Re = _members(counts_e, y_RD.shape[0])
        one_Re = mine_Re.to(b2_eD.dtype)
        if scores_R is not None:  # not a product: where there is padding, scores may be NaN
            one_Re = torch.where(mine_Re, scores_R.unsqueeze(1), 0.0).to(b2_eD.dtype)
        return y_RD + one_Re @ b2_eD


def _members(counts_e: GatheredRows, rows: int) -> GatheredRows:
    """`[R, e]`: True in the column of the row's expert, and nowhere in a row of no expert."""
    experts = torch.arange(counts_e.shape[0], device=counts_e.device)
    row_R = torch.arange(rows, device=counts_e.device)
    expert_R = torch.searchsorted(counts_e.cumsum(0), row_R, right=True)
    return expert_R.unsqueeze(1) == experts


# spmd: allow unknown - a kernel: the same for rows of whatever kind
def experts_ffn(
    x_RD: Tensor,
    counts_e: Tensor,
    w: Weights,
    scores_R: Tensor | None,
    gather: Gather | None,
    activation: Activation,
    matmul: Matmul | None,
    recompute: ExpertRecompute = ExpertRecompute.NONE,
    padded: bool = False,
) -> Tensor:
    """The experts as a function. `padded`: rows past the counts' sum are there, and become 0."""
    _check_dtype(x_RD, w.w1_eFD)
    # Settled here, and autocast left out of what follows: backward must compute as forward did.
    # Not in a constructor: weights may still move or be cast (meta device, FSDP).
    compute = matmul_dtype(x_RD)
    if matmul is None:
        matmul = choose_matmul(compute, x_RD.device, w.w1_eFD.shape[1:], fixed=padded)
    if isinstance(matmul, PerExpert):
        compute = matmul.compute or compute
        counts_e = counts_e.cpu()  # its loop runs on the host
    recipe = Recipe(activation, matmul, recompute, padded, compute)
    token_R, row_TK = gather if gather is not None else (None, None)
    if scores_R is not None:
        _check_scores(scores_R, x_RD if token_R is None else token_R)
    inputs = (x_RD, scores_R, *w)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        apply: Callable[..., Tensor] = _ExpertsFFN.apply
        return apply(recipe, counts_e, token_R, row_TK, *inputs)
    x_RD = x_RD if token_R is None else x_RD.index_select(0, token_R)
    return _forward(recipe, Call(x_RD, scores_R, w, activation), counts_e, keep=False)[0]


# spmd: allow unknown - a kernel: the same for rows of whatever kind
def _check_dtype(x_RD: Tensor, w1_eFD: Tensor) -> None:
    if not dtypes_match(x_RD, w1_eFD):
        raise DtypeError(
            explain(
                "Experts",
                f"rows are {describe(x_RD)}, w1 is {describe(w1_eFD)}",
                why="a cast that nobody wrote would change the precision of the layer",
                fixes=[f"x.to({w1_eFD.dtype})"],
            )
        )


# spmd: allow unknown - a kernel: the same for rows of whatever kind
def _check_scores(scores_R: Tensor, rows: Tensor) -> None:
    if scores_R.shape[0] != rows.shape[0]:
        raise ShapeError(
            explain(
                "Experts",
                f"scores_R is {describe(scores_R)}, for {plural(rows.shape[0], 'row')}",
                why="every row is multiplied by a weight of its own",
                fixes=[
                    "scores_R = take_scores(scores_TK, slots)   # sent the way that the rows are"
                ],
            )
        )


# spmd: allow unknown - a kernel: the same for rows of whatever kind
def _forward(
    recipe: Recipe, call: Call, counts_e: Tensor, *, keep: bool
) -> tuple[Tensor, Hidden | None]:
    compute, matmul = recipe.compute, recipe.matmul
    with no_autocast(call.x_RD):
        if isinstance(matmul, PerExpert):
            return per_expert.forward(call, counts_e, compute, matmul.row_block, keep=keep)
        cast = call.cast(compute)
        block = AllExperts(matmul, counts_e)
        hid = hidden(block, cast)
        y_RD = as_dtype(output(block, cast, hid), call.x_RD.dtype)
        y_RD = block.zero_past_the_end(y_RD) if recipe.padded else y_RD
        return y_RD, hid if keep else None


# spmd: allow unknown - a kernel: the same for rows of whatever kind
def _backward(
    recipe: Recipe, call: Call, counts_e: Tensor, dy_RD: Tensor, kept: Hidden | None, needs: Needs
) -> Gradients:
    compute, matmul = recipe.compute, recipe.matmul
    with no_autocast(dy_RD):
        if isinstance(matmul, PerExpert):
            how = (compute, matmul.row_block)
            return per_expert.backward(call, counts_e, *how, dy_RD, kept, needs)
        cast = call.cast(compute)
        block = AllExperts(matmul, counts_e)
        hid = kept if kept is not None else hidden(block, cast)
        dy_RD = as_dtype(dy_RD.contiguous(), cast.x_RD.dtype)
        found = gradients(block, cast, hid, dy_RD, needs)
        for rows in (found.x_RD, found.scores_R):
            if recipe.padded and rows is not None:
                block.zero_past_the_end(rows)
    pairs = zip(found, call.tensors(), strict=True)
    return Gradients(*(None if g is None or t is None else as_dtype(g, t.dtype) for g, t in pairs))


@register_local_autograd_function
class _ExpertsFFN(torch.autograd.Function):
    """One node for the whole network, so that it decides what is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        counts_e: Tensor,
        token_R: Tensor | None,
        row_TK: Tensor | None,
        x: Tensor,
        scores_R: Tensor | None,
        *weights: Any,
    ) -> Tensor:
        x_RD = x if token_R is None else x.index_select(0, token_R)
        call = Call(x_RD, scores_R, Weights(*weights), recipe.activation)
        y_RD, kept = _forward(recipe, call, counts_e, keep=recipe.recompute is ExpertRecompute.NONE)
        ctx.recipe = recipe
        gate_RF, up_RF = kept if kept is not None else (None, None)
        ctx.save_for_backward(counts_e, token_R, row_TK, x, scores_R, *weights, gate_RF, up_RF)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        counts_e, token_R, row_TK, x, scores_R, *weights, gate_RF, up_RF = ctx.saved_tensors
        x_RD = x if token_R is None else x.index_select(0, token_R)
        call = Call(x_RD, scores_R, Weights(*weights), ctx.recipe.activation)
        kept = None if gate_RF is None else Hidden(gate_RF, up_RF)
        needs = Needs(*ctx.needs_input_grad[4:])
        dx, *others = _backward(ctx.recipe, call, counts_e, dy_RD, kept, needs)
        if dx is not None and row_TK is not None:
            dx = add_rows(dx, row_TK, every_slot=dx.shape[0] == row_TK.numel())
        return None, None, None, None, dx, *others
