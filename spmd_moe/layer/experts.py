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

from typing import final

import torch
from torch import nn

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.compute_dtype import dtypes_match, matmul_dtype
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
from spmd_moe.layer.activations import Activation
from spmd_moe.layer.choose_matmul import choose_matmul
from spmd_moe.layer.grouped_ffn import Call, Recipe, Weights, grouped_ffn
from spmd_moe.layer.grouped_matmul import GroupedMatmul, LoopedMatmul
from spmd_moe.layer.moe_config import ExpertRecompute
from spmd_moe.layer.permute import Gather, gather_rows
from spmd_moe.layer.routing_faults import nan_parameter
from spmd_moe.layer.scaled_rows import scaled


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
        matmul: GroupedMatmul | None = None,
        weigh_input: bool = False,
    ) -> None:
        super().__init__()
        self.weigh_input = weigh_input
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
        x: GatheredRows,
        counts_e: GatheredRows,
        scores_R: GatheredRows | None = None,
        gather: Gather | None = None,
        padded: bool = False,
    ) -> RowSums:
        """`y_RD`. With `gather`, `x` is tokens, and row r is token `token_R[r]`.

        `padded`: shapes are fixed, and rows past the counts' sum are no expert's; they become 0.
        """
        if self.weigh_input and scores_R is not None:
            x, scores_R, gather = _weighed(x, counts_e, scores_R, gather, padded), None, None
        w = Weights(self.w1_eFD, self.w2_eDF, self.w3_eFD, self.b1_eF, self.b3_eF)
        activation, matmul = self.activation, self.matmul
        part_RD: Rows = experts_ffn(
            x, counts_e, w, scores_R, gather, activation, matmul, self.recompute, padded
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


def _weighed(
    x: GatheredRows,
    counts_e: GatheredRows,
    scores_R: GatheredRows,
    gather: Gather | None,
    padded: bool,
) -> GatheredRows:
    """The rows that experts read, each times its weight."""
    x_RD: GatheredRows = gather_rows(x, gather)
    if padded:  # there, scores may be NaN
        row_R = torch.arange(scores_R.shape[0], device=counts_e.device)
        scores_R = torch.where(row_R < counts_e.sum(), scores_R, 0.0)
    return scaled(x_RD, scores_R)


def experts_ffn(
    x: GatheredRows,
    counts_e: GatheredRows,
    w: Weights,
    scores_R: GatheredRows | None,
    gather: Gather | None,
    activation: Activation,
    matmul: GroupedMatmul | None,
    recompute: ExpertRecompute = ExpertRecompute.NONE,
    padded: bool = False,
) -> Rows:
    """The experts as a function, without the last bias; see `Experts.forward`."""
    _check_dtype(x, w.w1_eFD)
    if scores_R is not None:
        _check_scores(scores_R, x if gather is None else gather.token_R)
    # Settled here, and autocast left out of what follows: backward must compute as forward did.
    # Not in a constructor: weights may still move or be cast (meta device, FSDP).
    compute = matmul_dtype(x)
    if matmul is None:
        matmul = choose_matmul(compute, x.device, w.w1_eFD.shape[1:], fixed=padded)
    if isinstance(matmul, LoopedMatmul):
        compute = matmul.compute or compute
    again = recompute is ExpertRecompute.FIRST_MATMULS
    recipe = Recipe(activation, matmul, compute, again, padded)
    y_RD: Rows = grouped_ffn(recipe, Call(counts_e, gather, x, scores_R, w))
    return y_RD


def _check_dtype(x_RD: GatheredRows, w1_eFD: ExpertInWeight) -> None:
    if not dtypes_match(x_RD, w1_eFD):
        raise DtypeError(
            explain(
                "Experts",
                f"rows are {describe(x_RD)}, w1 is {describe(w1_eFD)}",
                why="an implicit cast would change the precision of the layer",
                fixes=[f"x.to({w1_eFD.dtype})"],
            )
        )


def _check_scores(scores_R: GatheredRows, rows: GatheredRows) -> None:
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


def _members(counts_e: GatheredRows, rows: int) -> GatheredRows:
    """`[R, e]`: True in the column of the row's expert, and nowhere in a row of no expert."""
    experts = torch.arange(counts_e.shape[0], device=counts_e.device)
    row_R = torch.arange(rows, device=counts_e.device)
    expert_R = torch.searchsorted(counts_e.cumsum(0), row_R, right=True)
    return expert_R.unsqueeze(1) == experts
