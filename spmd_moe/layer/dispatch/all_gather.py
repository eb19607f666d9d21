"""Tokens travel to all ranks of the expert group, each computes its own experts, and sums go back.

What it moves does not depend on the routing: cheaper than an exchange where tokens choose experts
on most ranks anyway.
"""

# Shape letters in this file (a small letter is this rank's share of the capital):
#   T  tokens of all ranks of ep and etp    t  tokens of this rank    K  experts per token
#   D  model width    N  slots, t*K    R  rows at this rank's experts
#   E  experts    e  experts on this rank    i  ranks of ep    j  ranks of etp

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.compute_dtype import sum_dtype
from spmd_moe.core.host_values import read_ints
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import (
    EP,
    ETP,
    AllTokens,
    GatheredRows,
    P,
    Placed,
    R,
    Rows,
    RowSums,
    S,
    Tokens,
)
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer import routing_faults
from spmd_moe.layer.dispatch.forecast import Batch, Collective, gather, one, scatter
from spmd_moe.layer.dispatch.protocol import Arrived, experts_of_a_rank
from spmd_moe.layer.permute import Slots, fold, sort_by_expert, spread, take_scores
from spmd_moe.layer.router import Routing
from spmd_moe.layer.scaled_rows import scaled


@final
@dataclass(frozen=True, slots=True)
class Gathered:
    """Who has how many tokens, and which of the slots are here."""

    shapes: list[ShardShape]  # tokens of each rank, along the axes in the order of the gathers
    here: Slots  # of the slots of all gathered tokens: those whose expert is here
    late_R: GatheredRows | None  # the weights of the rows, if `collect` applies them


@final
class AllGather:
    """Dispatcher that gathers every token on every rank of ep and etp.

    Args:
        mesh: The mesh of the layer.
        num_experts: The number of experts of the layer.

    Raises:
        ConfigError: The experts cannot be divided over the ranks of ep.

    Example:
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, AllGather
        >>> mesh = MoEMesh.single()
        >>> dispatcher = AllGather(mesh, num_experts=4)
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh, dispatcher)
    """

    fixed_shapes = False

    def __init__(self, mesh: MoEMesh, num_experts: int) -> None:
        experts_of_a_rank("AllGather", mesh, num_experts)
        self.axes, self.ep = [mesh[role] for role in (ETP, EP)], mesh[EP]
        self.num_experts = num_experts

    def dispatch(
        self, x_tD: Tokens, scores_tK: Tokens | None, routing: Routing
    ) -> tuple[Arrived, Gathered]:
        ids_tK, counts_E = routing.expert_ids_TK, routing.counts_E
        weights_tK, early = (
            routing.scores_TK if scores_tK is None else scores_tK,
            scores_tK is not None,
        )
        return self._arrive(x_tD, weights_tK, ids_tK, counts_E, routing.fault, early)

    # Only for its signature, as is said in protocol.py: rows are of the expert mesh from here on.
    def _arrive(
        self,
        x_tD: Rows,
        weights_tK: Rows,
        expert_ids_tK: Rows,
        counts_E: Rows,
        marked: Rows,
        early: bool,
    ) -> tuple[Arrived, Gathered]:
        shapes, rows, counts_e = self._count(expert_ids_tK, counts_E, marked)
        ids_TK = self._gather(expert_ids_tK, shapes)
        all_E = torch.arange(self.num_experts, device=ids_TK.device)
        own_e: Placed[Tensor, EP[S[0]]] = redistribute(all_E, self.ep, src=R, dst=S(0))
        local_TK = ids_TK - own_e.select(0, 0)
        elsewhere_TK = (local_TK < 0) | (local_TK >= own_e.shape[0])
        here = sort_by_expert(torch.where(elsewhere_TK, -1, local_TK), every_slot=False, rows=rows)
        rows_RD = spread(self._gather(x_tD, shapes), here)
        weights_R = take_scores(self._gather(weights_tK, shapes), here)
        early_R, late_R = (weights_R, None) if early else (None, weights_R)
        # spmd: allow argument - taken by places that are each rank's own, what is whole becomes V
        arrived = Arrived(rows_RD, early_R, counts_e)
        # spmd: allow argument - the weights of these rows, as above
        return arrived, Gathered(shapes, here, late_R)

    def collect(self, y_RD: RowSums, state: Gathered) -> Tokens:
        """Adds the rows of each token on this rank, and sends one sum for each token."""
        if state.late_R is not None:
            y_RD = scaled(y_RD, state.late_R)
        y = declare_sum(fold(y_RD, state.here), self.ep)
        for axis, shape in reversed(list(zip(self.axes, state.shapes, strict=True))):
            y = redistribute(y, axis, src=P, dst=S(0), shape=shape, dtype=sum_dtype(y))
        return y

    def combine(self, rows_TD: Tokens, state: Gathered) -> Tokens:
        return rows_TD

    def forecast(self, batch: Batch) -> Iterator[Collective]:
        (etp, ep), dim, wide = self.axes, [batch.dim], batch.wide
        by_etp = ShardShape.ragged(batch.tokens_ij[ep.rank])
        by_ep = ShardShape.ragged([sum(of_etp) for of_etp in batch.tokens_ij])
        axes = [(etp, by_etp), (ep, by_ep)]
        travel = [("choices", [batch.top_k], torch.int64), ("tokens", dim, batch.dtype)]
        travel.append(("weights", [batch.top_k], batch.weight_dtype))

        what, marks = "how many tokens and choices each rank has", 1
        for axis, _ in axes:
            shape = (1, 1 + self.num_experts + marks)
            yield from one("forward", what, "all_gather", axis, shape, torch.int64)
            marks *= axis.size
        for name, tail, dtype in travel:
            for axis, rows in axes:
                what = f"{name} to all ranks"
                yield from gather("forward", what, axis, rows, tail, dtype)
        for axis, rows in reversed(axes):
            yield from scatter("forward", "sums back to their tokens", axis, rows, dim, wide)
        for axis, rows in axes:
            yield from gather("backward", "gradient of sums", axis, rows, dim, batch.dtype)
        for name, tail, dtype in reversed(travel[1:]):
            summed = torch.promote_types(dtype, torch.float32)
            for axis, rows in reversed(axes):
                yield from scatter("backward", f"gradient of {name}", axis, rows, tail, summed)

    def _count(
        self, expert_ids_tK: Rows, counts_E: Rows, marked: Rows
    ) -> tuple[list[ShardShape], int, GatheredRows]:
        """The tokens of each rank (along ep, of its etp group), and the rows of the experts here.

        The host reads once, after all ranks have been heard.
        """
        tokens = torch.ones_like(expert_ids_tK.select(1, 0)).sum(0, keepdim=True)
        head, behind = 1 + self.num_experts, 1  # numbers to add up, then marks to keep apart
        told = torch.cat([tokens, counts_E, marked.view(1)]).unsqueeze(0)
        tokens_of_axes = []
        for axis in self.axes:
            per_rank = redistribute(told, axis, src=S(0), dst=R)
            tokens_of_axes.append(per_rank.select(1, 0))
            sums, marks = per_rank.narrow(1, 0, head).sum(0), per_rank.narrow(1, head, behind)
            behind = behind * axis.size
            # spmd: allow branch - with each round it is whole on one more axis
            told = torch.cat([sums, marks.t().flatten()]).unsqueeze(0)
        told_E = told.select(0, 0).narrow(0, 1, self.num_experts)
        counts_e = redistribute(told_E, self.ep, src=R, dst=S(0))
        marks = told.select(0, 0).narrow(0, head, behind)
        ints = read_ints(torch.cat([*tokens_of_axes, counts_e.sum(0, keepdim=True), marks]))
        shapes = []
        for axis in self.axes:
            shapes.append(ShardShape.ragged(ints[: axis.size]))
            ints = ints[axis.size :]
        rows, *faults = ints
        routing_faults.check_marks(faults, self.axes, self.num_experts)
        return shapes, rows, counts_e

    def _gather(self, x: Rows, shapes: list[ShardShape]) -> AllTokens:
        gathered = x
        for axis, shape in zip(self.axes, shapes, strict=True):
            gathered = redistribute(
                gathered, axis, src=S(0), dst=R, shape=shape, grad_dtype=sum_dtype(x)
            )
        return gathered
