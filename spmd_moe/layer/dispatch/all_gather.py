"""Tokens travel to all ranks of the expert group, each computes its own experts, and sums go back.

What it moves does not depend on the routing: cheaper than an exchange where tokens choose experts
on most ranks anyway.
"""

# Shape letters in this file (a small letter is this rank's share of the capital):
#   T  tokens of all ranks of ep and etp    t  tokens of this rank    K  experts per token
#   D  model width    R  rows at this rank's experts    E  experts    e  experts on this rank

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.dtypes import sum_dtype
from spmd_moe.core.host_reads import read_ints
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import EP, ETP, AllTokens, P, Placed, R, Rows, RowSums, S, Tokens
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer import routing_faults
from spmd_moe.layer.dispatch.protocol import Arrived, experts_of_a_rank
from spmd_moe.layer.permute import Slots, from_slots, sort_by_expert, spread, take_scores, to_slots
from spmd_moe.layer.router import Routing, count_choices


@final
@dataclass(frozen=True, slots=True)
class Gathered:
    """Who has how many tokens, and which of the slots are here."""

    shapes: list[ShardShape]  # tokens of each rank, along the axes in the order of the gathers
    here: Slots  # of the slots of all gathered tokens: those whose expert is here
    own: Slots  # of the slots of this rank's tokens: those that have an expert


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

    def __init__(self, mesh: MoEMesh, num_experts: int) -> None:
        experts_of_a_rank("AllGather", mesh, num_experts)
        self.axes, self.ep = [mesh[role] for role in (ETP, EP)], mesh[EP]
        self.num_experts = num_experts

    def dispatch(
        self, x_tD: Tokens, scores_tK: Tokens | None, routing: Routing, slots: Slots
    ) -> tuple[Arrived, Gathered]:
        return self._arrive(x_tD, scores_tK, routing.expert_ids_TK, routing.fault, slots)

    # Only for its signature, as is said in protocol.py: rows are of the expert mesh from here on.
    def _arrive(
        self, x_tD: Rows, scores_tK: Rows | None, expert_ids_tK: Rows, marked: Rows, own: Slots
    ) -> tuple[Arrived, Gathered]:
        shapes = self._count(expert_ids_tK, marked)
        ids_TK, all_E = self._gather(expert_ids_tK, shapes), torch.arange(self.num_experts)
        own_e: Placed[Tensor, EP[S[0]]] = redistribute(
            all_E.to(ids_TK.device), self.ep, src=R, dst=S(0)
        )
        local_TK = ids_TK - own_e.select(0, 0)
        elsewhere_TK = (local_TK < 0) | (local_TK >= own_e.shape[0])
        local_TK = torch.where(elsewhere_TK, -1, local_TK)
        here = sort_by_expert(local_TK, every_slot=False)
        # spmd: allow argument - taken by places that are each rank's own, what is whole becomes V
        arrived = Arrived(
            spread(self._gather(x_tD, shapes), here),
            None if scores_tK is None else take_scores(self._gather(scores_tK, shapes), here),
            count_choices(local_TK, own_e.shape[0]),
        )
        return arrived, Gathered(shapes, here, own)

    def collect(self, y_RD: RowSums, state: Gathered) -> Tokens:
        y = declare_sum(to_slots(y_RD, state.here), self.ep)  # each slot's row is on one rank
        choices = state.own.row_TK.shape[1]  # spmd: allow unknown - only its shape is read
        for axis, shape in reversed(list(zip(self.axes, state.shapes, strict=True))):
            slots = ShardShape.ragged([tokens * choices for tokens in shape.sizes])
            y = redistribute(y, axis, src=P, dst=S(0), shape=slots, dtype=sum_dtype(y))
        return from_slots(y, state.own)

    def _count(self, expert_ids_tK: Rows, marked: Rows) -> list[ShardShape]:
        """How many tokens each rank has; along ep, how many all ranks of its etp group have."""
        tokens = torch.ones_like(expert_ids_tK.select(1, 0)).sum(0, keepdim=True)
        told = torch.stack([tokens, marked.view(1)], 1)  # and then the marks of all ranks so far
        shapes, marks = [], [0]
        for axis in self.axes:
            per_rank = redistribute(told, axis, src=S(0), dst=R)
            ints = read_ints(per_rank.t().flatten())
            rows, marks = ints[: axis.size], ints[axis.size :]
            shapes.append(ShardShape.ragged(rows))
            here, seen = per_rank.narrow(1, 0, 1), per_rank.narrow(1, 1, told.shape[1] - 1)
            # spmd: allow branch - with each round it is whole on one more axis
            told = torch.cat([here.sum(0), seen.flatten()]).unsqueeze(0)
        routing_faults.check_marks(marks, self.axes, self.num_experts)
        return shapes

    def _gather(self, x: Rows, shapes: list[ShardShape]) -> AllTokens:
        gathered = x
        for axis, shape in zip(self.axes, shapes, strict=True):
            gathered = redistribute(
                gathered, axis, src=S(0), dst=R, shape=shape, grad_dtype=sum_dtype(x)
            )
        return gathered
