"""The collectives of one layer, forward and backward, by arithmetic alone.

Which collectives there are, and on which axes, follows from the configuration; how many rows they
move follows from the tokens of each rank and from their choices. Experts are assumed to be chosen
in turn, as with `RouterConfig(force_balance=True)`, so a plan shows experts used evenly. The
dispatcher forecasts its own collectives.

`tokens_r` are the tokens inside the layer of every rank of the world. Inputs and weights are
assumed to need gradients, and `expert_weights` to have the dtype of the tokens.
"""

# Shape letters in this file:
#   E  experts    r  ranks of the world    i  ranks of ep    j  ranks of etp

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from spmd_moe.check.layouts import Layout
from spmd_moe.core.placement import DENSE, EP, ETP, EXPERT, TP, I, R, Role
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.boundary import INSIDE
from spmd_moe.layer.dispatch.forecast import Batch, Collective, gather, one, scatter
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import MoEConfig, ScoreApplication
from spmd_moe.layer.router import first_in_turn


def forecast(
    layer: MoE, layout: Layout, rank: int, tokens_r: Sequence[int], dtype: torch.dtype
) -> list[Collective] | None:
    """What `rank` issues in one forward and one backward, in order.

    None where the dispatcher of the layer does not forecast its own.
    """
    found = _Forecast(layer, layout, rank, tuple(tokens_r), dtype)
    dispatched = layer.dispatcher.forecast(found.batch())
    return None if dispatched is None else list(found.all(list(dispatched)))


class _Forecast:
    def __init__(
        self, layer: MoE, layout: Layout, rank: int, tokens_r: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.config: MoEConfig = layer.config
        self.tell, self.tp = layer.router.tell, layer.mesh[TP]
        self.layout, self.rank, self.tokens_r, self.dtype = layout, rank, tokens_r, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.score_dtype = self.config.router.dtype
        self.early = self.config.score_application is not ScoreApplication.IN_COMBINE
        self.whole = self.config.src != INSIDE
        sharded = self.config.shared is not None and self.config.shared.sharded
        self.must_count = not self.whole and (self.config.dst != INSIDE or sharded)

    def all(self, dispatch: Sequence[Collective]) -> Iterator[Collective]:
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

    # --- the boundary ---

    def _tp_rows(self) -> ShardShape:
        ranks = group(self.layout, self.rank, TP)
        return ShardShape.ragged([self.tokens_r[rank] for rank in ranks])

    def _counted_tokens(self) -> Iterator[Collective]:
        if self.must_count:
            what = "how many tokens each rank has"
            yield from one("forward", what, "all_gather", self.tp, (1,), torch.int64)

    def _told_faults(self) -> Iterator[Collective]:
        for axis in self.tell:
            what = "whether scores are unusable"
            yield from one("forward", what, "reduce_scatter", axis, (axis.size,), torch.int64)

    def _leave(self) -> Iterator[Collective]:
        if self.config.dst != INSIDE:
            yield from gather(
                "forward", "output", self.tp, self._tp_rows(), [self.config.dim], self.dtype
            )

    def _leave_back(self) -> Iterator[Collective]:
        if self.config.dst is R:
            what = "gradient of the output"
            yield from scatter(
                "backward", what, self.tp, self._tp_rows(), [self.config.dim], self.wide
            )

    def _enter_back(self) -> Iterator[Collective]:
        if self.config.src is not I:
            return
        router = self.config.router
        given = [("the router's input", router.input_dim)] if router.input_dim else []
        given += [("expert_weights", router.top_k)] if router.given else []
        for name, width in (*given, ("the input", self.config.dim)):
            what = f"gradient of {name}"
            yield from gather("backward", what, self.tp, self._tp_rows(), [width], self.dtype)

    def _gate_back(self) -> Iterator[Collective]:
        router = self.config.router
        shapes = [] if router.given else [(router.num_choices, router.input_dim or self.config.dim)]
        of_experts = [(router.num_choices,)]
        for shape in of_experts * router.expert_scale + of_experts * router.bias + shapes:
            what = "gradient of the router's weight"
            yield from one("backward", what, "all_reduce", self.tp, shape, self.wide)

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
            yield from one("forward", f"loss: {what}", "all_reduce", self.tp, shape, dtype)

    # --- shared experts ---

    def _shared(self) -> Iterator[Collective]:
        shared, width = self.config.shared, [self.config.dim]
        if shared is not None and shared.sharded:
            rows = self._tp_rows()
            yield from gather(
                "forward", "tokens for the shared expert", self.tp, rows, width, self.dtype
            )
            what = "output of the shared expert"
            yield from scatter("forward", what, self.tp, rows, width, self.wide)

    def _shared_back(self) -> Iterator[Collective]:
        shared, width = self.config.shared, self.config.dim
        if shared is None:
            return
        what = "gradient of the shared expert's"
        if shared.gated:
            yield from one("backward", f"{what} gate", "all_reduce", self.tp, (1, width), self.wide)
        if shared.sharded:
            rows = self._tp_rows()
            yield from gather("backward", f"{what} output", self.tp, rows, [width], self.dtype)
            yield from scatter("backward", f"{what} tokens", self.tp, rows, [width], self.wide)
            return
        inward = (shared.hidden_dim, width)
        shapes = [inward[::-1], inward] + [inward] * self.config.activation.gated
        for shape in shapes:
            yield from one("backward", f"{what} weight", "all_reduce", self.tp, shape, self.wide)

    # --- the dispatcher ---

    def batch(self) -> Batch:
        """The sizes in this rank's group of ep and etp."""
        ranks_ij = [group(self.layout, rank, ETP) for rank in group(self.layout, self.rank, EP)]
        return Batch(
            tokens_ij=[[self.tokens_r[rank] for rank in ranks_j] for ranks_j in ranks_ij],
            counts_ijE=[[self._chosen(rank) for rank in ranks_j] for ranks_j in ranks_ij],
            reached_ijs=[[self._reached(rank) for rank in ranks_j] for ranks_j in ranks_ij],
            dim=self.config.dim,
            top_k=self.config.router.top_k,
            dtype=self.dtype,
            weight_dtype=self.score_dtype,
            early=self.early,
        )

    # --- rows ---

    def _chosen(self, rank: int) -> list[int]:
        """How many of a rank's choices, made in turn, fall on each expert."""
        experts = self.config.router.num_experts
        full, rest = divmod(self.tokens_r[rank] * self.config.router.top_k, experts)
        first = first_in_turn(rank, self.layout.world, experts)
        return [full + ((expert - first) % experts < rest) for expert in range(experts)]

    def _reached(self, rank: int) -> list[int]:
        """How many of a rank's tokens reach each rank of ep, with round-robin choices."""
        experts, top_k = self.config.router.num_experts, self.config.router.top_k
        share = experts // self.layout.ep
        first = first_in_turn(rank, self.layout.world, experts)
        # Choices repeat after at most `num_experts` tokens.
        full, rest = divmod(self.tokens_r[rank], experts)
        reached = [0] * self.layout.ep
        for token in range(experts):
            start = first + token * top_k
            for owner in {(start + k) % experts // share for k in range(top_k)}:
                reached[owner] += full + (token < rest)
        return reached


def group(layout: Layout, rank: int, role: Role) -> list[int]:
    """The ranks that share an axis with a rank, in order."""
    here = layout.place(rank)
    others = [r for r in (DENSE if role in DENSE else EXPERT) if r is not role]
    places = ((other, layout.place(other)) for other in range(layout.world))
    return [other for other, place in places if all(place[o] == here[o] for o in others)]
