"""All-to-all that sends each token at most once to a rank, and one sum of expert outputs back.

`AllToAll` sends a token once for each of its experts. Here a rank that has several of them copies
the token, and adds the experts' outputs before it sends them back. Backward does the same.

    token 0 chose e0 e1 e2      to rank 0 (e0 e1)   row 0         expert ids 0 1
    token 1 chose e2 e3         to rank 1 (e2 e3)   rows 0 1      expert ids 0 | 0 1

One int32 is sent for each choice. It encodes the expert on the receiving rank and whether the
choice is the first one of its row. Router weights are sent in a separate exchange, in their own
dtype, even if the experts do not apply them, because the receiving rank adds weighted outputs.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    N  slots that have an expert
#   E  experts   e  experts on this rank
#   L  tokens that leave this rank, once for each rank that they go to
#   M  tokens that arrive, those of all etp ranks    R  rows at the experts, made of these
#   S  ranks of ep

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as fn

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import GatheredRows, Rows, RowSums, Tokens
from spmd_moe.layer.copy_rows import Copies, add_copies, copy
from spmd_moe.layer.dispatch.forecast import Batch, Collective
from spmd_moe.layer.dispatch.protocol import Arrived, experts_of_a_rank
from spmd_moe.layer.dispatch.ragged_exchange import Load, RaggedExchange, Traffic
from spmd_moe.layer.permute import inverse, reorder
from spmd_moe.layer.router import Routing


@final
@dataclass(frozen=True, slots=True)
class Expanded:
    """Data that `collect` and `combine` need to add rows and to return the sums."""

    leaving: Copies  # rows that left, as copies of this rank's tokens
    traffic: Traffic  # of tokens
    here: Copies  # rows at the experts, as copies of arrived tokens
    weights_R: GatheredRows | None  # of the rows, if the experts do not apply them


@final
class DedupAllToAll:
    """Dispatcher that sends each token at most once to a rank, in each direction.

    Values and gradients equal those of `AllToAll`, except that sums are taken in a different order.

    Args:
        mesh: The mesh of the layer.
        num_experts: The number of experts of the layer.

    Raises:
        ConfigError: The experts cannot be divided over the ranks of ep.

    Example:
        >>> from spmd_moe import DedupAllToAll, MoE, MoEConfig, MoEMesh, RouterConfig
        >>> mesh = MoEMesh.single()
        >>> dispatcher = DedupAllToAll(mesh, num_experts=4)
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh, dispatcher)
    """

    fixed_shapes = False

    def __init__(self, mesh: MoEMesh, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_local = experts_of_a_rank("DedupAllToAll", mesh, num_experts)
        self.ragged = RaggedExchange(mesh, num_experts, self.num_local)
        self.axes = self.ragged.ep, self.ragged.etp

    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing
    ) -> tuple[Arrived, Expanded]:
        ranks, e = self.ragged.ep.size, self.num_local
        rank_TK = torch.floor_divide(routing.expert_ids_TK, e)  # -1 stays -1
        goes_TS = self._goes(rank_TK)
        # To every rank: the counts of its experts, the number of tokens, and this rank's faults.
        tokens_S1, marks = goes_TS.sum(0).unsqueeze(1), routing.fault.view(1, 1).expand(ranks, 1)
        told = torch.cat([routing.counts_E.view(ranks, e), tokens_S1, marks], 1)
        got = self.ragged.tell(told)

        # Overlaps with the exchange: sort slots by rank, then by token.
        slot_N = rank_TK.flatten().argsort(stable=True)
        token_N = torch.floor_divide(slot_N, rank_TK.shape[1])
        rank_N = rank_TK.flatten().index_select(0, slot_N)
        first_N = self._first(rank_N, token_N, rank_TK.shape[0])
        ids_N = routing.expert_ids_TK.flatten().index_select(0, slot_N).remainder(e)
        codes_N = (ids_N * 2 + first_N).to(torch.int32)
        counts_Se, (by_slot, by_token) = self.ragged.count(told, got)
        if not routing.complete:  # slots without an expert come first
            rows = sum(by_slot.sends)
            none = slot_N.shape[0] - rows
            slot_N, token_N = slot_N.narrow(0, none, rows), token_N.narrow(0, none, rows)
            first_N, codes_N = first_N.narrow(0, none, rows), codes_N.narrow(0, none, rows)

        codes = self.ragged.send(codes_N, by_slot)
        leaving = self._leaving(first_N, token_N, goes_TS, sum(by_token.sends))
        rows_MD = self.ragged.send(copy(x_TD, leaving), by_token)
        scores = routing.scores_TK if scores_TK is None else scores_TK
        weights = self.ragged.send(scores.flatten().index_select(0, slot_N), by_slot)
        arriving = codes, rows_MD, weights, counts_Se, (by_slot, by_token), scores_TK is not None
        arrived, here, late_R = self._arrive(*arriving)
        return arrived, Expanded(leaving, by_token, here, late_R)

    def collect(self, y_RD: RowSums, state: Expanded) -> Tokens:
        dtype = y_RD.dtype
        if state.weights_R is not None:
            y_RD = y_RD * state.weights_R.unsqueeze(1)
        return self.ragged.send_back(add_copies(y_RD, state.here, dtype), state.traffic)

    def combine(self, rows_LD: Tokens, state: Expanded) -> Tokens:
        return add_copies(rows_LD, state.leaving)

    def forecast(self, batch: Batch) -> Iterator[Collective]:
        slots_ijs, dtype = batch.slots_ijs(self.num_local), batch.weight_dtype
        rows = Load("rows", batch.reached_ijs, [batch.dim], batch.dtype, batch.wide)
        ids = Load("ids", slots_ijs, [], torch.int32, None)
        loads = [ids, rows, Load("weights", slots_ijs, [], dtype, dtype)]
        return self.ragged.forecast(batch, self.num_local + 2, loads, rows)

    def _goes(self, rank_TK: Tokens) -> Tokens:
        """1 where a token has a choice on a rank."""
        ranks = self.ragged.ep.size
        none_TS = rank_TK.new_zeros(rank_TK.shape[0], 1 + ranks)
        return none_TS.scatter(1, rank_TK + 1, 1).narrow(1, 1, ranks)

    def _first(self, rank_N: Tokens, token_N: Tokens, tokens: int) -> Tokens:
        """1 at the first slot of each token on each rank."""
        key_N = rank_N * tokens + token_N
        before_N = fn.pad(key_N, [1, 0], value=-1).narrow(0, 0, key_N.shape[0])
        return (key_N != before_N).to(torch.int64)

    def _leaving(self, first_N: Tokens, token_N: Tokens, goes_TS: Tokens, rows: int) -> Copies:
        """Rows to all ranks as copies of the tokens."""
        place_N = first_N.cumsum(0) - 1
        token_L = token_N.new_zeros(rows).scatter(0, place_N, token_N)
        sizes_T = goes_TS.sum(1)
        return Copies(token_L, token_L.argsort(stable=True), sizes_T.cumsum(0) - sizes_T)

    def _arrive(
        self,
        codes: Rows,
        rows: Rows,
        weights: Rows,
        counts_Se: GatheredRows,
        traffic: tuple[Traffic, Traffic],
        early: bool,
    ) -> tuple[Arrived, Copies, GatheredRows | None]:
        """Rows of all etp ranks, expert-major."""
        by_slot, by_token = traffic
        codes_R, tokens = self.ragged.gather(codes, by_slot), by_token.gathered.total
        here, order_R, back_R = self._here(codes_R.to(torch.int64), tokens)
        rows_RD = copy(self.ragged.gather(rows, by_token), here)
        weights_R = reorder(self.ragged.gather(weights, by_slot), order_R, back_R)
        early_R, late_R = (weights_R, None) if early else (None, weights_R)
        return Arrived(rows_RD, early_R, counts_Se.sum(0)), here, late_R

    def _here(
        self, codes_R: GatheredRows, tokens: int
    ) -> tuple[Copies, GatheredRows, GatheredRows]:
        """Rows at the experts as copies of the tokens that arrived; their order, and back."""
        order_R = torch.floor_divide(codes_R, 2).argsort(stable=True)
        back_R = inverse(order_R)
        token_R = codes_R.remainder(2).cumsum(0) - 1
        sizes_M = codes_R.new_zeros(tokens).scatter_add(0, token_R, torch.ones_like(token_R))
        start_M = sizes_M.cumsum(0) - sizes_M
        return Copies(token_R.index_select(0, order_R), back_R, start_M), order_R, back_R
