"""Rows travel in buffers of a fixed size: no size is read by the host, so a graph can be captured.

Every rank has room for `rows_per_rank` rows to each rank of its ep group, and sends all of it:

    rows to rank 0    a b          sent (3 each)   a b .
    rows to rank 1    c d e f                      c d e      f found no room

What finds no room is counted on the device and reported as dropped; its share of the output is 0.
Padding is there between `_fill` and its counterpart in `collect`: at the experts it stands behind
all rows and belongs to none of them.

Sizes being fixed, counts and router weights share one exchange before the rows, the counts as
numbers of the weights' dtype: float32 holds them exactly, and no bits are reinterpreted.
"""

# Shape letters in this file (a small letter is this rank's share of the capital):
#   T  tokens    K  experts per token    D  model width    N  slots, T*K
#   E  experts   e  experts on this rank    S  ranks that rows go to, or come from
#   C  room for rows from one rank to another    B  the whole of a buffer, S*C
#   R  rows at the experts, those of all etp ranks, with padding at the end

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from spmd_moe.core.collectives import exchange
from spmd_moe.core.compute_dtype import sum_dtype
from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import EP, ETP, GatheredRows, P, R, Rows, RowSums, S, Tokens
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.core.validate import is_positive_int
from spmd_moe.layer.combine import combine
from spmd_moe.layer.dispatch.forecast import Batch, Collective, gather, one, scatter
from spmd_moe.layer.dispatch.protocol import Arrived, experts_of_a_rank
from spmd_moe.layer.permute import (
    Slots,
    inverse,
    place,
    reorder,
    sort_by_expert,
    spread,
    take_scores,
)
from spmd_moe.layer.router import Routing


@final
@dataclass(frozen=True, slots=True)
class InBuffers:
    """Where each row is in the buffers, and back."""

    slots: Slots
    late_TK: Tokens | None  # the weights that `combine` applies
    row_B: Tokens  # the row at each place; N where there is none
    place_N: Tokens  # the place of each row; B where it found none
    order_R: GatheredRows  # from the order of arrival to expert-major
    back_R: GatheredRows


# float32 holds every integer up to here.
_MOST_ROWS = 1 << 24


@final
class FixedCapacity:
    """Dispatcher with static shapes, for decoding: the host reads no size.

    Choices that exceed the capacity are dropped and counted.

    Args:
        mesh: The mesh of the layer.
        num_experts: The number of experts of the layer.
        rows_per_rank: Rows that each rank sends to each rank of ep; equal on all ranks.

    Raises:
        ConfigError: The experts cannot be divided over the ranks of ep.

    Example:
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, FixedCapacity
        >>> mesh = MoEMesh.single()
        >>> dispatcher = FixedCapacity(mesh, num_experts=4, rows_per_rank=6)
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh, dispatcher)
    """

    fixed_shapes = True

    def __init__(self, mesh: MoEMesh, num_experts: int, rows_per_rank: int) -> None:
        where = "FixedCapacity"
        self.num_local = experts_of_a_rank(where, mesh, num_experts, rows_per_rank=rows_per_rank)
        if not is_positive_int(rows_per_rank) or rows_per_rank > _MOST_ROWS:
            raise ConfigError(
                explain(
                    where,
                    f"rows_per_rank is {rows_per_rank!r}; it must be an integer from 1 to "
                    f"{_MOST_ROWS}",
                    why="it is the number of rows that one rank can send to another",
                    fixes=["rows_per_rank=tokens * top_k   # what a rank has: all rows find room"],
                )
            )
        self.ep, self.etp = mesh[EP], mesh[ETP]
        self.num_experts, self.axes = num_experts, (self.ep, self.etp)
        self.room = rows_per_rank

    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing
    ) -> tuple[Arrived, InBuffers]:
        # Every slot has a row, also one without an expert; that row comes back as zeros.
        slots = sort_by_expert(routing.expert_ids_TK, every_slot=True)
        counts_Se = routing.counts_E.view(self.ep.size, self.num_local)
        # spmd: allow unknown - its length
        row_B, place_N = self._fill(counts_Se, slots.slot_N.shape[0])
        sent_Se = self._with_room(counts_Se)
        dropped = counts_Se.sum() - sent_Se.sum()
        head = sent_Se
        if scores_TK is not None:
            scores_B = place(take_scores(scores_TK, slots), row_B, place_N)
            scores_SC = scores_B.view(self.ep.size, self.room)
            head = torch.cat([sent_Se.to(scores_TK.dtype), scores_SC], 1)
        got = self._send(head, 1)
        rows_BD = self._send(place(spread(x_TD, slots), row_B, place_N), self.room)
        arrived, order_R, back_R = self._arrive(got, rows_BD, dropped)
        late_TK = routing.scores_TK if scores_TK is None else None
        return arrived, InBuffers(slots, late_TK, row_B, place_N, order_R, back_R)

    def collect(self, y_RD: RowSums, state: InBuffers) -> Tokens:
        y_RD = reorder(y_RD, state.back_R, state.order_R)
        y_BD = redistribute(y_RD, self.etp, src=P, dst=S(0), dtype=sum_dtype(y_RD))
        return self._take_out(self._send(y_BD, self.room), state.place_N, state.row_B)

    def combine(self, rows_ND: Tokens, state: InBuffers) -> Tokens:
        return combine(rows_ND, state.slots, state.late_TK)

    def forecast(self, batch: Batch) -> Iterator[Collective]:
        ep, etp, dim, wide = self.ep, self.etp, [batch.dim], batch.wide
        dtype, scores = batch.dtype, batch.score_dtype
        heads = ShardShape.ragged([ep.size] * etp.size)
        buffers = ShardShape.ragged([ep.size * self.room] * etp.size)
        buffer = (ep.size * self.room, *dim)
        head = [self.num_local + (0 if scores is None else self.room)]
        head_dtype = scores or torch.int64
        named = "choices of each expert" + ("" if scores is None else ", and weights")

        yield from one("forward", named, "all_to_all", ep, (ep.size, *head), head_dtype)
        what = "rows to their experts"
        yield from one("forward", what, "all_to_all", ep, buffer, dtype)
        yield from gather("forward", named, etp, heads, head, head_dtype)
        what = "rows to every slice of an expert"
        yield from gather("forward", what, etp, buffers, dim, dtype)
        what = "sums over the slices of an expert"
        yield from scatter("forward", what, etp, buffers, dim, wide)
        what = "rows back to their tokens"
        yield from one("forward", what, "all_to_all", ep, buffer, dtype)

        what = "gradient of rows, to their experts"
        yield from one("backward", what, "all_to_all", ep, buffer, dtype)
        what = "gradient of rows, to every slice"
        yield from gather("backward", what, etp, buffers, dim, dtype)
        what = "gradient of rows, summed"
        yield from scatter("backward", what, etp, buffers, dim, wide)
        if scores is not None:
            what = "gradient of weights, summed"
            yield from scatter("backward", what, etp, heads, head, scores)
        what = "gradient of rows, to their tokens"
        yield from one("backward", what, "all_to_all", ep, buffer, dtype)
        if scores is not None:
            what = "gradient of weights, to their tokens"
            yield from one("backward", what, "all_to_all", ep, (ep.size, *head), scores)

    def _arrive(
        self, head: Rows, rows_BD: Rows, dropped: Tokens
    ) -> tuple[Arrived, GatheredRows, GatheredRows]:
        """Rows of all etp ranks, expert-major; their order, and the way back."""
        heads, scores_R = self._gather(head), None
        counts_Se = heads.narrow(1, 0, self.num_local).to(torch.int64)
        order_R = self._expert_major(counts_Se)
        back_R = inverse(order_R)
        if heads.shape[1] > self.num_local:
            scores_SC = heads.narrow(1, self.num_local, self.room)
            scores_R = reorder(scores_SC.flatten(), order_R, back_R)
        arrived = Arrived(
            reorder(self._gather(rows_BD), order_R, back_R),
            scores_R,
            counts_Se.sum(0),
            padded=True,
            dropped=dropped,
        )
        return arrived, order_R, back_R

    # Only for its signature, as is said in protocol.py: rows are of the dense mesh from here on.
    def _take_out(self, y_BD: Tokens, place_N: Tokens, row_B: Tokens) -> Tokens:
        return place(y_BD, place_N, row_B)

    def _send(self, x: Tokens, rows: int) -> Rows:
        sizes = [rows] * self.ep.size
        return exchange(x, self.ep.group, receives=sizes, sends=sizes)

    def _gather(self, x: Rows) -> GatheredRows:
        return redistribute(x, self.etp, src=S(0), dst=R, grad_dtype=sum_dtype(x))

    def _fill(self, counts_Se: Tokens, rows: int) -> tuple[Tokens, Tokens]:
        """The row at each place of the buffer, and the place of each row.

        Rows without an expert are the first of all; then come those of rank 0, of rank 1, ...
        """
        sizes_S = counts_Se.sum(1)
        ends_S = rows - sizes_S.sum() + sizes_S.cumsum(0)
        starts_S = ends_S - sizes_S
        column_C = torch.ones_like(sizes_S.new_empty(self.room)).cumsum(0) - 1
        row_SC = starts_S.unsqueeze(1) + column_C
        row_B = torch.where(column_C < sizes_S.unsqueeze(1), row_SC, rows).flatten()
        number_N = torch.ones_like(sizes_S.new_empty(rows)).cumsum(0) - 1
        rank_N = torch.searchsorted(ends_S, number_N, right=True)
        column_N = number_N - starts_S.index_select(0, rank_N.clamp(max=self.ep.size - 1))
        fits_N = (column_N >= 0) & (column_N < self.room)
        nowhere = self.ep.size * self.room
        return row_B, torch.where(fits_N, rank_N * self.room + column_N, nowhere)

    def _with_room(self, counts_Se: Tokens) -> Tokens:
        """Of the rows for each expert, those that find room: the first ones to each rank."""
        ends_Se = counts_Se.cumsum(1)
        starts_Se = ends_Se - counts_Se
        return ends_Se.clamp(max=self.room) - starts_Se.clamp(max=self.room)

    def _expert_major(self, counts_Se: GatheredRows) -> GatheredRows:
        """The order of all places that puts rows expert by expert, and padding last."""
        column_C = torch.ones_like(counts_Se.new_empty(self.room)).cumsum(0) - 1
        columns_SC = column_C.expand(counts_Se.shape[0], self.room).contiguous()
        expert_SC = torch.searchsorted(counts_Se.cumsum(1), columns_SC, right=True)
        return expert_SC.flatten().argsort(stable=True)
