"""Rows travel to the ranks that have their experts, and back: one exchange each way.

Before that, every rank sends the ranks of its ep group the number of rows they will get. The host
reads the answer, for which it waits; where all slots have experts, it waits nowhere else.

Router weights have an exchange of their own, in their own dtype. To append their bits to bf16 rows
would save that exchange, but takes two more passes over all rows, and a compiler that computes bf16
in float32 (Inductor) does not keep the bits.
"""

# Shape letters in this file (a small letter is this rank's share of the capital):
#   T  tokens    K  experts per token    D  model width    N  slots that have an expert
#   E  experts   e  experts on this rank
#   M  rows that this rank receives itself    R  rows at its experts: those of all etp ranks
#   S  ranks whose rows those are, ep ranks of each etp rank in turn
#   i  ranks of ep    j  ranks of etp

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from spmd_moe.core.collectives import exchange
from spmd_moe.core.dtypes import sum_dtype
from spmd_moe.core.host_reads import read_ints
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import EP, ETP, GatheredRows, P, R, Rows, RowSums, S, Tokens
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer import routing_faults
from spmd_moe.layer.dispatch.forecast import Batch, Collective, gather, one, scatter
from spmd_moe.layer.dispatch.protocol import Arrived, experts_of_a_rank
from spmd_moe.layer.permute import Slots, expert_major, inverse, reorder, spread, take_scores
from spmd_moe.layer.router import Routing


@final
@dataclass(frozen=True, slots=True)
class Counted:
    """Who sends how many rows to whom."""

    sends: list[int]  # rows to each rank of ep
    receives: list[int]  # rows from each rank of ep
    gathered: ShardShape  # rows of each rank of etp
    counts_Se: GatheredRows  # rows for each expert here, by the rank they come from


@final
@dataclass(frozen=True, slots=True)
class InTransit:
    """What `collect` needs to send every row back the way it came."""

    counted: Counted
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
        self.axes = self.ep, self.etp = mesh[EP], mesh[ETP]

    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing, slots: Slots
    ) -> tuple[Arrived, InTransit]:
        ranks, e = self.ep.size, self.num_local
        # To every rank the counts of its experts; behind them, what is wrong here, if anything is.
        marks = routing.fault.view(1, 1).expand(ranks, 1)
        sent = torch.cat([routing.counts_E.view(ranks, e), marks], 1)
        got = exchange(sent, self.ep.group, receives=[1] * ranks, sends=[1] * ranks)
        counted = self._count(sent, got)
        rows_MD = self._send(spread(x_TD, slots), counted)
        scores_M = None
        if scores_TK is not None:  # after the rows: reordering those need not wait for it
            scores_M = self._send(take_scores(scores_TK, slots), counted)
        return self._arrive(rows_MD, scores_M, counted)

    def collect(self, y_RD: RowSums, state: InTransit) -> Tokens:
        counted = state.counted
        y_RD = reorder(y_RD, state.back_R, state.order_R)
        y_MD = redistribute(
            y_RD, self.etp, src=P, dst=S(0), shape=counted.gathered, dtype=sum_dtype(y_RD)
        )
        return exchange(y_MD, self.ep.group, receives=counted.sends, sends=counted.receives)

    def forecast(self, batch: Batch) -> Iterator[Collective]:
        ep, etp, dim, wide = self.ep, self.etp, [batch.dim], batch.wide
        dtype, scores = batch.dtype, batch.score_dtype
        by_ep = [self._arriving(batch, i, etp.rank) for i in range(ep.size)]
        at_etp = ShardShape.ragged([self._arriving(batch, ep.rank, j) for j in range(etp.size)])
        sent, mine = sum(batch.counts_ijE[ep.rank][etp.rank]), by_ep[ep.rank]
        even, there, back = len(set(by_ep)) == 1, (sent, *dim), (mine, *dim)

        what, shape = "choices of each expert", (ep.size, self.num_local + 1)
        yield from one("forward", what, "all_to_all", ep, shape, torch.int64)
        yield from one("forward", what, "all_gather", etp, shape, torch.int64)
        what = "rows to their experts"
        yield from one("forward", what, "all_to_all", ep, there, dtype, even)
        if scores is not None:
            what = "weights to their experts"
            yield from one("forward", what, "all_to_all", ep, [sent], scores, even)
        what = "rows to every slice of an expert"
        yield from gather("forward", what, etp, at_etp, dim, dtype)
        if scores is not None:
            what = "weights to every slice of an expert"
            yield from gather("forward", what, etp, at_etp, [], scores)
        what = "sums over the slices of an expert"
        yield from scatter("forward", what, etp, at_etp, dim, wide)
        what = "rows back to their tokens"
        yield from one("forward", what, "all_to_all", ep, back, dtype, even)

        what = "gradient of rows, to their experts"
        yield from one("backward", what, "all_to_all", ep, there, dtype, even)
        what = "gradient of rows, to every slice"
        yield from gather("backward", what, etp, at_etp, dim, dtype)
        if scores is not None:
            what = "gradient of weights, summed"
            yield from scatter("backward", what, etp, at_etp, [], scores)
        what = "gradient of rows, summed"
        yield from scatter("backward", what, etp, at_etp, dim, wide)
        if scores is not None:
            what = "gradient of weights, to their tokens"
            yield from one("backward", what, "all_to_all", ep, [mine], scores, even)
        what = "gradient of rows, to their tokens"
        yield from one("backward", what, "all_to_all", ep, back, dtype, even)

    def _arriving(self, batch: Batch, i: int, j: int) -> int:
        """Rows that the ranks of its ep group send to the rank at i on ep and j on etp."""
        first = i * self.num_local
        senders = (of_ep[j] for of_ep in batch.counts_ijE)
        return sum(sum(counts[first : first + self.num_local]) for counts in senders)

    def _send(self, x: Tokens, counted: Counted) -> Rows:
        return exchange(x, self.ep.group, receives=counted.receives, sends=counted.sends)

    def _count(self, sent: Rows, got: Rows) -> Counted:
        """From the rows that this rank sends to and gets from each expert: all sizes at once."""
        ranks, e = self.ep.size, self.num_local
        from_all = redistribute(got, self.etp, src=S(0), dst=R)
        counts_Se, marks_S1 = from_all.narrow(1, 0, e), from_all.narrow(1, e, 1)
        sent_S, got_S = sent.narrow(1, 0, e).sum(1), got.narrow(1, 0, e).sum(1)
        told_S = torch.cat([marks_S1.flatten(), sent_S, got_S, counts_Se.sum(1)])
        ints, all_ranks = read_ints(told_S), from_all.shape[0]
        marks, rows = ints[:all_ranks], ints[all_ranks:]
        routing_faults.check_marks(marks, (self.etp, self.ep), self.num_experts)
        sends, receives, *by_peer = (rows[i : i + ranks] for i in range(0, len(rows), ranks))
        gathered = ShardShape.ragged([sum(peer) for peer in by_peer])
        return Counted(sends, receives, gathered, counts_Se)

    def _arrive(
        self, rows_MD: Rows, scores_M: Rows | None, counted: Counted
    ) -> tuple[Arrived, InTransit]:
        """Rows of all etp ranks, expert-major."""
        shape = counted.gathered
        order_R = expert_major(counted.counts_Se, shape.total)
        back_R = inverse(order_R)
        rows_RD = reorder(self._gather(rows_MD, shape), order_R, back_R)
        scores_R = None
        if scores_M is not None:
            scores_R = reorder(self._gather(scores_M, shape), order_R, back_R)
        arrived = Arrived(rows_RD, scores_R, counted.counts_Se.sum(0))
        return arrived, InTransit(counted, order_R, back_R)

    def _gather(self, x: Rows, shape: ShardShape) -> GatheredRows:
        return redistribute(x, self.etp, src=S(0), dst=R, shape=shape, grad_dtype=sum_dtype(x))
