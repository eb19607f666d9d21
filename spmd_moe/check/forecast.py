"""The collectives of one layer, forward and backward, by arithmetic alone.

Which collectives there are, and on which axes, follows from the configuration; how many rows they
move follows from the tokens of each rank and from who chooses whom. For that the choices are taken
in turn, as `RouterConfig(balanced=True)` makes them, so a plan is of even use of the experts.

`tokens_r` are the tokens inside the layer of every rank of the world. Input and weights are taken
to need gradients.
"""

# Shape letters in this file:
#   D  model width    K  experts per token    E  experts    e  experts of one rank of ep
#   r  ranks of the world    p  ranks of one group

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch

from spmd_moe.check.layouts import Layout
from spmd_moe.core.placement import DENSE, EP, ETP, EXPERT, TP, I, R, Role
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.boundary import INSIDE
from spmd_moe.layer.dispatch import AllGather, AllToAll, Local
from spmd_moe.layer.experts import ScoreApplication
from spmd_moe.layer.moe import MoE, MoEConfig
from spmd_moe.layer.router import first_in_turn

When = Literal["forward", "backward"]


@final
@dataclass(frozen=True, slots=True)
class Collective:
    """One collective as this rank issues it."""

    when: When
    what: str  # what travels, and why
    op: str
    role: Role
    shape: tuple[int, ...]  # of what this rank gives, padding included
    dtype: torch.dtype
    even: bool  # every rank of the axis gives as much without padding

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def forecast(
    layer: MoE, layout: Layout, rank: int, tokens_r: Sequence[int], dtype: torch.dtype
) -> list[Collective]:
    """What `rank` issues in one forward and one backward, in order."""
    return list(_Forecast(layer, layout, rank, tuple(tokens_r), dtype).all())


class _Forecast:
    def __init__(
        self, layer: MoE, layout: Layout, rank: int, tokens_r: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.config: MoEConfig = layer.config
        self.dispatcher, self.tell = layer.dispatcher, [axis.role for axis in layer.router.tell]
        self.layout, self.rank, self.tokens_r, self.dtype = layout, rank, tokens_r, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.score_dtype = self.config.router.dtype
        self.early = self.config.score_application is not ScoreApplication.IN_COMBINE
        self.whole = self.config.src != INSIDE
        sharded = self.config.shared is not None and self.config.shared.sharded
        self.must_count = not self.whole and (self.config.dst != INSIDE or sharded)

    def all(self) -> Iterator[Collective]:
        dispatch = list(self._dispatcher())
        yield from self._counted_tokens()
        yield from self._told_faults()
        yield from (c for c in dispatch if c.when == "forward")
        yield from self._shared()
        yield from self._losses()
        yield from self._leave()
        yield from self._leave_back()
        yield from self._shared_back()
        yield from (c for c in dispatch if c.when == "backward")
        yield from self._gate_back()
        yield from self._enter_back()

    def _group(self, role: Role) -> list[int]:
        return group(self.layout, self.rank, role)

    def _one(
        self,
        when: When,
        what: str,
        op: str,
        role: Role,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        even: bool = True,
    ) -> Iterator[Collective]:
        """The collective, unless the axis has one rank: then nothing moves."""
        if self.layout.sizes[role] > 1:
            yield Collective(when, what, op, role, tuple(shape), dtype or self.dtype, even)

    def _gather(
        self,
        when: When,
        what: str,
        role: Role,
        rows: ShardShape,
        tail: Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> Iterator[Collective]:
        yield from self._one(
            when, what, "all_gather", role, (_padded(rows), *tail), dtype, rows.equal
        )

    def _scatter(
        self,
        when: When,
        what: str,
        role: Role,
        rows: ShardShape,
        tail: Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> Iterator[Collective]:
        shape = (_padded(rows) * rows.ranks, *tail)
        yield from self._one(when, what, "reduce_scatter", role, shape, dtype, rows.equal)

    # --- the boundary ---

    def _tp_rows(self) -> ShardShape:
        return ShardShape.ragged([self.tokens_r[rank] for rank in self._group(TP)])

    def _counted_tokens(self) -> Iterator[Collective]:
        if self.must_count:
            what = "how many tokens each rank has"
            yield from self._one("forward", what, "all_gather", TP, (1,), torch.int64)

    def _told_faults(self) -> Iterator[Collective]:
        for role in self.tell:
            what = "whether scores are unusable"
            shape = (self.layout.sizes[role],)
            yield from self._one("forward", what, "reduce_scatter", role, shape, torch.int64)

    def _leave(self) -> Iterator[Collective]:
        if self.config.dst != INSIDE:
            yield from self._gather("forward", "output", TP, self._tp_rows(), [self.config.dim])

    def _leave_back(self) -> Iterator[Collective]:
        if self.config.dst is R:
            what = "gradient of the output"
            yield from self._scatter(
                "backward", what, TP, self._tp_rows(), [self.config.dim], self.wide
            )

    def _enter_back(self) -> Iterator[Collective]:
        if self.config.src is I:
            what = "gradient of the input"
            yield from self._gather("backward", what, TP, self._tp_rows(), [self.config.dim])

    def _gate_back(self) -> Iterator[Collective]:
        shape = (self.config.router.num_experts, self.config.dim)
        what = "gradient of the router's weight"
        yield from self._one("backward", what, "all_reduce", TP, shape, self.wide)

    def _losses(self) -> Iterator[Collective]:
        if self.config.balance is None or not self.whole:
            return
        experts, probs = self.config.router.num_experts, self.score_dtype
        integer = torch.int64
        for what, shape, dtype in (
            ("sums of probabilities", (1, experts), probs),
            ("choices of each expert", (1, experts), integer),
            ("tokens", (1,), integer),
            ("z", (), probs),
        ):
            yield from self._one("forward", f"loss: {what}", "all_reduce", TP, shape, dtype)

    # --- shared experts ---

    def _shared(self) -> Iterator[Collective]:
        shared, width = self.config.shared, [self.config.dim]
        if shared is not None and shared.sharded:
            rows = self._tp_rows()
            yield from self._gather("forward", "tokens for the shared expert", TP, rows, width)
            what = "output of the shared expert"
            yield from self._scatter("forward", what, TP, rows, width, self.wide)

    def _shared_back(self) -> Iterator[Collective]:
        shared, width = self.config.shared, self.config.dim
        if shared is None:
            return
        what = "gradient of the shared expert's"
        if shared.gated:
            yield from self._one(
                "backward", f"{what} gate", "all_reduce", TP, (1, width), self.wide
            )
        if shared.sharded:
            rows = self._tp_rows()
            yield from self._gather("backward", f"{what} output", TP, rows, [width])
            yield from self._scatter("backward", f"{what} tokens", TP, rows, [width], self.wide)
            return
        inward = (shared.hidden_dim, width)
        shapes = [inward[::-1], inward] + [inward] * self.config.activation.gated
        for shape in shapes:
            yield from self._one("backward", f"{what} weight", "all_reduce", TP, shape, self.wide)

    # --- dispatchers ---

    def _dispatcher(self) -> Iterator[Collective]:
        if isinstance(self.dispatcher, AllToAll):
            return self._all_to_all()
        if isinstance(self.dispatcher, AllGather):
            return self._all_gather()
        if isinstance(self.dispatcher, Local):
            return iter(())
        raise NotImplementedError(type(self.dispatcher).__name__)

    def _all_to_all(self) -> Iterator[Collective]:
        ranks, width = self.layout.ep, self.config.dim
        share = self.config.router.num_experts // ranks
        sent = sum(self._chosen(self.rank))
        arrived = ShardShape.ragged([self._arriving(rank) for rank in self._group(ETP)])
        mine = self._arriving(self.rank)
        even = len({self._arriving(rank) for rank in self._group(EP)}) == 1
        packed = width + (self._score_parts() if self.early else 0)
        integer = torch.int64

        what, shape = "choices of each expert", (ranks, share + 1)
        yield from self._one("forward", what, "all_to_all", EP, shape, integer)
        yield from self._one("forward", what, "all_gather", ETP, shape, integer)
        what = "rows to their experts"
        yield from self._one("forward", what, "all_to_all", EP, (sent, packed), None, even)
        yield from self._gather(
            "forward", "rows to every slice of an expert", ETP, arrived, [width]
        )
        if self.early:
            what = "weights to every slice of an expert"
            yield from self._gather("forward", what, ETP, arrived, [], self.score_dtype)
        what = "sums over the slices of an expert"
        yield from self._scatter("forward", what, ETP, arrived, [width], self.wide)
        what = "rows back to their tokens"
        yield from self._one("forward", what, "all_to_all", EP, (mine, width), None, even)

        what = "gradient of rows, to their experts"
        yield from self._one("backward", what, "all_to_all", EP, (sent, width), None, even)
        what = "gradient of rows, to every slice"
        yield from self._gather("backward", what, ETP, arrived, [width])
        if self.early:
            what, scores = "gradient of weights, summed", self.score_dtype
            yield from self._scatter("backward", what, ETP, arrived, [], scores)
        yield from self._scatter(
            "backward", "gradient of rows, summed", ETP, arrived, [width], self.wide
        )
        what = "gradient of rows, to their tokens"
        yield from self._one("backward", what, "all_to_all", EP, (mine, packed), None, even)

    def _all_gather(self) -> Iterator[Collective]:
        width, choices, integer = self.config.dim, self.config.router.top_k, torch.int64
        axes = self._gather_shapes()
        marks = 1  # of the ranks so far: what is wrong with their scores or ids
        for role, _ in axes:
            what = "how many tokens each rank has"
            yield from self._one("forward", what, "all_gather", role, (1, 1 + marks), integer)
            marks *= self.layout.sizes[role]
        gathers: list[tuple[str, list[int], torch.dtype]] = [("choices", [choices], integer)]
        gathers.append(("tokens", [width], self.dtype))
        if self.early:
            gathers.append(("weights", [choices], self.score_dtype))
        for what, tail, dtype in gathers:
            for role, rows in axes:
                yield from self._gather("forward", f"{what} to all ranks", role, rows, tail, dtype)
        slots = [(role, _times(rows, choices)) for role, rows in axes]
        for role, rows in reversed(slots):
            what = "rows back to their tokens"
            yield from self._scatter("forward", what, role, rows, [width], self.wide)
        for role, rows in slots:
            yield from self._gather("backward", "gradient of rows", role, rows, [width])
        for what, tail, dtype in reversed(gathers[1:]):
            for role, rows in reversed(axes):
                wide = torch.promote_types(dtype, torch.float32)
                yield from self._scatter("backward", f"gradient of {what}", role, rows, tail, wide)

    # --- rows ---

    def _chosen(self, rank: int) -> list[int]:
        """How many of a rank's choices, made in turn, fall on each expert."""
        experts = self.config.router.num_experts
        full, rest = divmod(self.tokens_r[rank] * self.config.router.top_k, experts)
        first = first_in_turn(rank, self.layout.world, experts)
        return [full + ((expert - first) % experts < rest) for expert in range(experts)]

    def _arriving(self, rank: int) -> int:
        """Rows that the ranks of its ep group send to a rank."""
        place, share = self.layout.place(rank), self.config.router.num_experts // self.layout.ep
        first = place[EP] * share
        senders = group(self.layout, rank, EP)
        return sum(sum(self._chosen(r)[first : first + share]) for r in senders)

    def _score_parts(self) -> int:
        """How many elements of a row hold a score."""
        wide = torch.promote_types(self.dtype, self.score_dtype)
        return wide.itemsize // self.dtype.itemsize

    def _gather_shapes(self) -> list[tuple[Role, ShardShape]]:
        """Tokens along etp, then along ep: there each rank has those of its etp group."""
        along_etp = ShardShape.ragged([self.tokens_r[rank] for rank in self._group(ETP)])
        totals = [
            sum(self.tokens_r[peer] for peer in group(self.layout, rank, ETP))
            for rank in self._group(EP)
        ]
        return [(ETP, along_etp), (EP, ShardShape.ragged(totals))]


def group(layout: Layout, rank: int, role: Role) -> list[int]:
    """The ranks that share an axis with a rank, in order."""
    here = layout.place(rank)
    others = [r for r in (DENSE if role in DENSE else EXPERT) if r is not role]
    places = ((other, layout.place(other)) for other in range(layout.world))
    return [other for other, place in places if all(place[o] == here[o] for o in others)]


def _padded(rows: ShardShape) -> int:
    """Rows that a rank gives: at least one, so that none is left out."""
    return max(rows.padded, 1)


def _times(rows: ShardShape, factor: int) -> ShardShape:
    return ShardShape.ragged([n * factor for n in rows.sizes])
