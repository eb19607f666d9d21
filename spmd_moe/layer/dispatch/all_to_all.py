"""Rows travel to the ranks that have their experts, and back: one exchange each way.

Router weights have an exchange of their own, in their own dtype. To append their bits to bf16 rows
would save that exchange, but takes two more passes over all rows, and a compiler that computes bf16
in float32 (Inductor) does not keep the bits.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    N  slots that have an expert
#   E  experts   e  experts on this rank
#   M  rows that this rank receives itself    R  rows at its experts: those of all etp ranks
#   S  ranks whose rows those are, ep ranks of each etp rank in turn

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import GatheredRows, Rows, RowSums, Tokens
from spmd_moe.layer.combine import combine
from spmd_moe.layer.dispatch.forecast import Batch, Collective
from spmd_moe.layer.dispatch.protocol import Arrived, experts_of_a_rank
from spmd_moe.layer.dispatch.ragged_exchange import Load, RaggedExchange, Traffic
from spmd_moe.layer.permute import (
    Slots,
    by_expert,
    expert_major,
    inverse,
    reorder,
    slots_of,
    spread,
    take_scores,
)
from spmd_moe.layer.router import Routing


@final
@dataclass(frozen=True, slots=True)
class InTransit:
    """Data that `collect` and `combine` need to return rows to their tokens."""

    slots: Slots
    late_TK: Tokens | None  # the weights that `combine` applies
    traffic: Traffic
    order_R: GatheredRows  # from the order of arrival to expert-major
    back_R: GatheredRows


@final
class AllToAll:
    """Dispatcher for experts sharded on ep and etp: one exchange of rows in each direction.

    Args:
        mesh: The mesh of the layer.
        num_experts: The number of experts of the layer.

    Raises:
        ConfigError: The experts cannot be divided over the ranks of ep.

    Example:
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, AllToAll
        >>> mesh = MoEMesh.single()
        >>> dispatcher = AllToAll(mesh, num_experts=4)
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh, dispatcher)
    """

    fixed_shapes = False

    def __init__(self, mesh: MoEMesh, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_local = experts_of_a_rank("AllToAll", mesh, num_experts)
        self.ragged = RaggedExchange(mesh, num_experts, self.num_local)
        self.axes = self.ragged.ep, self.ragged.etp

    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing
    ) -> tuple[Arrived, InTransit]:
        ranks, e = self.ragged.ep.size, self.num_local
        # To every rank the counts of its experts; behind them, what is wrong here, if anything is.
        marks = routing.fault.view(1, 1).expand(ranks, 1)
        told = torch.cat([routing.counts_E.view(ranks, e), marks], 1)
        got, ids_TK = self.ragged.tell(told), routing.expert_ids_TK
        slot_N = by_expert(ids_TK)  # overlaps with the exchange
        counts_Se, (traffic,) = self.ragged.count(told, got)
        slots = slots_of(slot_N, ids_TK, routing.complete, sum(traffic.sends))
        rows_MD = self.ragged.send(spread(x_TD, slots), traffic)
        scores_M = None
        if scores_TK is not None:  # after the rows: reordering those need not wait for it
            scores_M = self.ragged.send(take_scores(scores_TK, slots), traffic)
        arrived, order_R, back_R = self._arrive(rows_MD, scores_M, counts_Se, traffic)
        late_TK = routing.scores_TK if scores_TK is None else None
        return arrived, InTransit(slots, late_TK, traffic, order_R, back_R)

    def collect(self, y_RD: RowSums, state: InTransit) -> Tokens:
        return self.ragged.send_back(reorder(y_RD, state.back_R, state.order_R), state.traffic)

    def combine(self, rows_ND: Tokens, state: InTransit) -> Tokens:
        return combine(rows_ND, state.slots, state.late_TK)

    def forecast(self, batch: Batch) -> Iterator[Collective]:
        rows = Load("rows", batch.slots_ijs(self.num_local), [batch.dim], batch.dtype, batch.wide)
        loads = [rows]
        if batch.score_dtype is not None:
            dtype = batch.score_dtype
            loads.append(Load("weights", rows.numbers_ijs, [], dtype, dtype))
        return self.ragged.forecast(batch, self.num_local + 1, loads, rows)

    def _arrive(
        self, rows_MD: Rows, scores_M: Rows | None, counts_Se: GatheredRows, traffic: Traffic
    ) -> tuple[Arrived, GatheredRows, GatheredRows]:
        """Rows of all etp ranks, expert-major; their order, and the way back."""
        order_R = expert_major(counts_Se, traffic.gathered.total)
        back_R = inverse(order_R)
        rows_RD = reorder(self.ragged.gather(rows_MD, traffic), order_R, back_R)
        scores_R = None
        if scores_M is not None:
            scores_R = reorder(self.ragged.gather(scores_M, traffic), order_R, back_R)
        return Arrived(rows_RD, scores_R, counts_Se.sum(0)), order_R, back_R
