"""Exchanges of a variable number of rows: counts first, then rows, in both directions.

Every rank sends the ranks of its ep group the numbers of rows that they will receive. The host
waits to read the counts that arrive; if all slots have experts, this is the only wait.
"""

# Shape letters in this file:
#   e  experts on this rank    D  model width
#   C  numbers sent to a rank: rows for each of its experts, further counts of rows, faults
#   S  ranks of ep; after the gather on etp, the ep ranks of each etp rank in order
#   i, s  ranks of ep that send and receive    j  ranks of etp

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast, final

import torch
from torch import Tensor

from spmd_moe.core.collectives import exchange
from spmd_moe.core.compute_dtype import sum_dtype
from spmd_moe.core.host_values import read_ints
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import EP, ETP, GatheredRows, P, R, Rows, RowSums, S, Tokens
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer import routing_faults
from spmd_moe.layer.dispatch.forecast import Batch, Collective, When, gather, one, scatter

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument


@final
@dataclass(frozen=True, slots=True)
class Traffic:
    """The number of rows that each rank sends and receives."""

    sends: list[int]  # rows to each rank of ep
    receives: list[int]  # rows from each rank of ep
    gathered: ShardShape  # rows of each rank of etp


@final
@dataclass(frozen=True, slots=True)
class Load:
    """The rows of one exchange, for a forecast."""

    what: str
    numbers_ijs: Sequence[Sequence[Sequence[int]]]  # from the rank at i, j to each rank of ep
    tail: list[int]  # shape of a row
    dtype: torch.dtype
    grad_dtype: torch.dtype | None  # of the sums of gradients on etp; None: no gradient


@final
class RaggedExchange:
    """Sends rows to the ranks of ep, gathers them on etp, and sends sums back."""

    def __init__(self, mesh: MoEMesh, num_experts: int, num_local: int) -> None:
        self.ep, self.etp = mesh[EP], mesh[ETP]
        self.num_experts, self.num_local = num_experts, num_local

    def tell(self, numbers_SC: Tokens) -> Rows:
        """Send every rank its numbers: `[S, C]`, with this rank's faults in the last column."""
        ones = [1] * self.ep.size
        return exchange(numbers_SC, self.ep.group, receives=ones, sends=ones)

    def count(self, told_SC: Rows, got_SC: Rows) -> tuple[GatheredRows, list[Traffic]]:
        """Rows for each expert here by the rank they come from, and how many rows travel.

        First those with a row for each choice, then those of each other number. One read.
        """
        ranks, e = self.ep.size, self.num_local
        from_all = redistribute(got_SC, self.etp, src=S(0), dst=R)
        all_ranks, others = from_all.shape[0], from_all.shape[1] - e - 1
        sent, got = _by_kind(told_SC, e, others), _by_kind(got_SC, e, others)
        by_kind = torch.cat([sent, got, _by_kind(from_all, e, others)])
        marks_S = from_all.select(1, e + others)
        ints = read_ints(torch.cat([marks_S, by_kind.t().flatten()]))
        routing_faults.check_marks(ints[:all_ranks], (self.etp, self.ep), self.num_experts)
        step = 2 * ranks + all_ranks
        kinds = (ints[start : start + step] for start in range(all_ranks, len(ints), step))
        return from_all.narrow(1, 0, e), [_traffic(kind, ranks) for kind in kinds]

    def send(self, x: Tokens, traffic: Traffic) -> Rows:
        return exchange(x, self.ep.group, receives=traffic.receives, sends=traffic.sends)

    def gather(self, x: Rows, traffic: Traffic) -> GatheredRows:
        """The rows of all etp ranks."""
        return redistribute(
            x, self.etp, src=S(0), dst=R, shape=traffic.gathered, grad_dtype=sum_dtype(x)
        )

    def send_back(self, y: RowSums, traffic: Traffic) -> Tokens:
        mine = redistribute(
            y, self.etp, src=P, dst=S(0), shape=traffic.gathered, dtype=sum_dtype(y)
        )
        return exchange(mine, self.ep.group, receives=traffic.sends, sends=traffic.receives)

    def forecast(
        self, batch: Batch, numbers: int, loads: Sequence[Load], rows: Load
    ) -> Iterator[Collective]:
        """The collectives of a forward that sends `loads` there and `rows` back, and of backward.

        `numbers`: how many numbers are sent to each rank.
        """
        ep, etp = self.ep, self.etp
        what, shape = "choices of each expert", (ep.size, numbers)
        yield from one("forward", what, "all_to_all", ep, shape, torch.int64)
        yield from one("forward", what, "all_gather", etp, shape, torch.int64)
        for load in loads:
            what = f"{load.what} to their experts"
            yield from self._exchange("forward", what, load, there=True)
        for load in loads:
            what = f"{load.what} to every slice of an expert"
            at_etp = self._at_etp(load)
            yield from gather("forward", what, etp, at_etp, load.tail, load.dtype)
        what, at_etp = "sums over the slices of an expert", self._at_etp(rows)
        yield from scatter("forward", what, etp, at_etp, rows.tail, batch.wide)
        yield from self._exchange("forward", "rows back to their tokens", rows, there=False)

        what = "gradient of rows, to their experts"
        yield from self._exchange("backward", what, rows, there=True)
        what = "gradient of rows, to every slice"
        yield from gather("backward", what, etp, at_etp, rows.tail, rows.dtype)
        with_gradient = [load for load in reversed(loads) if load.grad_dtype is not None]
        for load in with_gradient:
            what, at_etp = f"gradient of {load.what}, summed", self._at_etp(load)
            assert load.grad_dtype is not None
            yield from scatter("backward", what, etp, at_etp, load.tail, load.grad_dtype)
        for load in with_gradient:
            what = f"gradient of {load.what}, to their tokens"
            yield from self._exchange("backward", what, load, there=False)

    def _exchange(self, when: When, what: str, load: Load, *, there: bool) -> Iterator[Collective]:
        arriving = [self._arriving(load, i, self.etp.rank) for i in range(self.ep.size)]
        rows = arriving[self.ep.rank]
        if there:
            rows = sum(load.numbers_ijs[self.ep.rank][self.etp.rank])
        even, shape = len(set(arriving)) == 1, (rows, *load.tail)
        yield from one(when, what, "all_to_all", self.ep, shape, load.dtype, even)

    def _at_etp(self, load: Load) -> ShardShape:
        arriving = (self._arriving(load, self.ep.rank, j) for j in range(self.etp.size))
        return ShardShape.ragged(list(arriving))

    def _arriving(self, load: Load, i: int, j: int) -> int:
        """Rows that the ranks of its ep group send to the rank at i on ep and j on etp."""
        return sum(of_ep[j][i] for of_ep in load.numbers_ijs)


def _by_kind(numbers_SC: T, num_local: int, others: int) -> T:
    """Rows to or from each rank: as many as its choices, then the other numbers."""
    slots = numbers_SC.narrow(1, 0, num_local).sum(1, keepdim=True)
    return cast(T, torch.cat([slots, numbers_SC.narrow(1, num_local, others)], 1))


def _traffic(numbers: list[int], ranks: int) -> Traffic:
    """From those of one kind: what is sent, what is received, and that of all etp ranks."""
    sends, receives, *by_peer = (numbers[i : i + ranks] for i in range(0, len(numbers), ranks))
    return Traffic(sends, receives, ShardShape.ragged([sum(peer) for peer in by_peer]))
