"""Cases of the layer on a layout: inputs by rank, and what the ranks' results mean together.

`meaning` reads the tensors of the ranks as their kinds say: S is joined, P is summed, R and I must
be equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from spmd_types import Shard
from torch import Tensor

from spmd_moe.check.layouts import Layout as Layout
from spmd_moe.core.placement import (
    EP,
    I,
    Kind,
    P,
    Placement,
    R,
    Role,
)
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.moe_config import MoEConfig


def seed_of(layout: Layout) -> str:
    """What draws of a layout are seeded with."""
    return f"dp{layout.dp}cp{layout.cp}tp{layout.tp}-ep{layout.ep}etp{layout.etp}"


def _ones(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


def part(whole: Tensor, placement: Placement, layout: Layout, rank: int) -> Tensor:
    """What `rank` holds of a whole tensor that is sharded evenly."""
    for role_kind in placement:
        if isinstance(role_kind.kind, Shard):
            role, dim = role_kind.role, role_kind.kind.dim
            whole = whole.chunk(layout.sizes[role], dim)[layout.place(rank)[role]]
    return whole.clone()


def meaning(by_rank: list[Tensor], placement: Placement, layout: Layout) -> Tensor:
    """The whole that the ranks' tensors stand for."""
    table = {tuple(layout.place(r)[k.role] for k in placement): t for r, t in enumerate(by_rank)}
    assert len(table) == len(by_rank)
    for position in reversed(range(len(placement.kinds))):
        kind, role = placement.kinds[position].kind, placement.kinds[position].role
        rows: dict[tuple[int, ...], list[Tensor]] = {}
        for key in sorted(table):
            rows.setdefault(key[:position] + key[position + 1 :], []).append(table[key])
        table = {key: _joined(parts, kind, role) for key, parts in rows.items()}
    return table[()]


def _joined(parts: list[Tensor], kind: Kind, role: Role) -> Tensor:
    if kind is P:
        return sum(parts[1:], parts[0])
    if kind is R or kind is I:
        for other in parts[1:]:
            assert torch.equal(parts[0], other), f"{kind!r} on {role}, but ranks differ"
        return parts[0]
    return torch.cat(parts, kind.dim if isinstance(kind, Shard) else 0)


def gradient(placement: Placement) -> Placement:
    """The placement of the gradient."""
    return Placement(tuple(k.role[k.kind.backward_type()] for k in placement))


@dataclass(frozen=True)
class Case:
    """A layer on a layout, and the tokens of each rank of tp in each (dp, cp) cell.

    Where the caller holds whole tensors on tp, the cell's tokens are simply all of them.
    """

    layout: Layout
    config: MoEConfig
    tokens: tuple[int, ...]  # for each rank
    batch: int = 1  # tokens stand in [batch, tokens / batch, width]
    dispatcher: str = ""
    masked: bool = False
    steer: str = ""  # who chooses: "" the router, or ids from outside, as `_id` has them

    def cell(self, rank: int) -> list[int]:
        """The ranks that share dp and cp with `rank`, in the order of tp."""
        first = rank - rank % self.layout.tp
        return list(range(first, first + self.layout.tp))

    def draw(self, what: str, rank: int, *shape: int) -> Tensor:
        """Random values that depend on the names alone."""
        seed = int.from_bytes(f"{what}{rank}".encode(), "little") % 2**31
        return torch.randn(
            shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )

    def rows(self, what: str, rank: int) -> Tensor:
        """This rank's tokens, [T, D], or gradients of them, or what else is of tokens."""
        router, width = self.config.router, self.config.dim
        width = {"router_input": router.input_dim or 0, "expert_weights": router.top_k}.get(
            what, width
        )
        return self.draw(what, rank, self.tokens[rank], width)

    def cell_rows(self, what: str, rank: int) -> Tensor:
        return torch.cat([self.rows(what, r) for r in self.cell(rank)])

    @property
    def whole_in(self) -> bool:
        return self.config.src in (R, I)

    @property
    def whole_out(self) -> bool:
        return self.config.dst in (R, I)

    def x(self, rank: int) -> Tensor:
        return self._as_x(lambda r: self.rows("x", r), rank)

    def beside(self, rank: int) -> dict[str, Tensor]:
        """Further inputs, with gradients of their own, by their names in the layer's forward."""
        return {
            name: self._as_x(lambda r, name=name: self.rows(name, r), rank)  # type: ignore[misc]  # mypy does not take defaults
            for name in self.more
        }

    @property
    def more(self) -> list[str]:
        router = self.config.router
        asked = {"router_input": router.input_dim is not None, "expert_weights": router.given}
        return [name for name, wanted in asked.items() if wanted]

    def token_mask(self, rank: int) -> Tensor:
        return torch.arange(self.tokens[rank]) % 3 != 1 if self.masked else _ones(self.tokens[rank])

    def token_ids(self, rank: int) -> Tensor:
        """This rank's ids, [T, K]; -2 where the router is to choose."""
        size = (self.tokens[rank], self.config.router.top_k)
        return torch.tensor([self._id(rank, *at) for at in np.ndindex(size)]).view(size).long()

    def _id(self, rank: int, token: int, choice: int) -> int:
        experts = self.config.router.num_experts
        share = experts // self.layout.ep
        theirs = (self.layout.place(rank)[EP] + 1) % self.layout.ep * share
        return {
            "": -2,
            "one expert": 3 if choice == 0 else -1,
            "next rank": theirs + (token + choice) % share if choice < share else -1,
            "some none": -1 if token % 3 == 0 else (5 * token + choice + rank) % experts,
        }[self.steer]

    def mask(self, rank: int) -> Tensor | None:
        return self._as_x(self.token_mask, rank) if self.masked else None

    def expert_ids(self, rank: int) -> Tensor | None:
        return self._as_x(self.token_ids, rank) if self.steer else None

    def _as_x(self, rows_of: Callable[[int], Tensor], rank: int) -> Tensor:
        """What goes with the tokens, in the shape that they have."""
        ranks = self.cell(rank) if self.whole_in else [rank]
        rows = torch.cat([rows_of(r) for r in ranks])
        return (
            rows.unflatten(0, (self.batch, rows.shape[0] // self.batch)) if self.batch > 1 else rows
        )

    def whole_mask(self) -> Tensor:
        return torch.cat([self.token_mask(r) for r in range(self.layout.world)])

    def whole_ids(self) -> Tensor:
        return torch.cat([self.token_ids(r) for r in range(self.layout.world)])

    def out_rows(self, whole: Tensor, rank: int) -> Tensor:
        """What `rank` gets of its cell's rows where the output is sharded."""
        if self.whole_in:
            shape, place = ShardShape.even(whole.shape[0], self.layout.tp), rank % self.layout.tp
        else:
            shape = ShardShape.ragged([self.tokens[r] for r in self.cell(rank)])
            place = rank % self.layout.tp
        return whole.narrow(0, shape.offsets[place], shape.sizes[place])

    def upstream(self, rank: int) -> Tensor:
        """The gradient of the output: a share of it where the output is R, so that they sum."""
        whole = self.cell_rows("g", rank)
        if self.config.dst is R:
            shares = [0.5**k for k in range(1, self.layout.tp)] + [0.5 ** (self.layout.tp - 1)]
            return whole * shares[rank % self.layout.tp]
        return whole if self.config.dst is I else self.out_rows(whole, rank)

    def weights(self) -> dict[str, Tensor]:
        """The parameters and buffers of the whole layer."""
        c, e, choices = self.config, self.config.router.num_experts, self.config.router.num_choices
        shapes: dict[str, tuple[int, ...]] = {
            "router.weight_ED": (choices, c.router.input_dim or c.dim),
            "router.bias_E": (choices,),
            "experts.w1_eFD": (e, c.hidden_dim, c.dim),
            "experts.w3_eFD": (e, c.hidden_dim, c.dim),
            "experts.w2_eDF": (e, c.dim, c.hidden_dim),
        }
        if c.router.given:
            del shapes["router.weight_ED"]
        if c.router.expert_scale:
            shapes["router.scale_E"] = (choices,)
        if c.bias:
            shapes |= {"experts.b1_eF": (e, c.hidden_dim), "experts.b3_eF": (e, c.hidden_dim)}
            shapes["experts.b2_eD"] = (e, c.dim)
        if c.shared is not None:
            wide = (c.shared.hidden_dim, c.dim)
            shapes |= {"shared.w1_FD": wide, "shared.w3_FD": wide, "shared.w2_DF": wide[::-1]}
            if c.shared.gated:
                shapes["shared.gate_1D"] = (1, c.dim)
        return {name: self.draw(name, 0, *shape) * 0.5 for name, shape in shapes.items()}
