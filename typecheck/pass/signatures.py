"""Correct code in every place where `Placed` may stand: no checker without our plugin objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from spmd_moe import (
    CP,
    DP,
    EDP,
    EP,
    ETP,
    TP,
    I,
    MoEMesh,
    P,
    Placed,
    R,
    S,
    ShardShape,
    V,
    redistribute,
)
from spmd_moe.core.placement import placement_of, placements_of

Tokens: TypeAlias = Placed[Tensor, DP[V], CP[V], TP[V]]
Sharded = Placed[Tensor, TP[S[0]]]
Hidden: TypeAlias = Placed[Tensor, EDP[R], EP[S[0]], ETP[S[1]]]


@dataclass(frozen=True)
class Record:
    x_TD: Tokens
    sums: Placed[Tensor, TP[P]] | None = None


class Pair(NamedTuple):
    a: Tokens
    b: Placed[Tensor, DP[R], TP[R]]


class Gate(nn.Module):
    weight_ED: Placed[nn.Parameter, DP[R], TP[I]]
    bias_E: Placed[Tensor, TP[R]]

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.tp = mesh[TP]
        self.weight_ED = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("bias_E", torch.zeros(2))

    def forward(self, x_TD: Tokens) -> tuple[Tokens, Placed[Tensor, TP[R]]]:
        weight = redistribute(self.weight_ED, self.tp, src=I, dst=R)
        return x_TD @ weight.T + self.bias_E, weight


def gather(x: Sharded, mesh: MoEMesh, shape: ShardShape) -> Placed[Tensor, TP[R]]:
    return redistribute(x, mesh[TP], src=S(0), dst=R, shape=shape)


def split(x: Placed[Tensor, TP[R]], mesh: MoEMesh) -> Sharded:
    kind = S[0]
    return redistribute(x, mesh[TP], src=R, dst=kind)


def maybe(x: Tokens | None, *rest: Tokens, **named: Hidden) -> list[Tokens]:
    return [t for t in (x, *rest, *named.values()) if t is not None]


def main() -> None:
    mesh = MoEMesh.single()
    y, weight = Gate(mesh)(torch.ones(4, 3))
    assert y.shape == (4, 2) and weight.shape == (2, 3)
    record, pair = Record(y), Pair(y, weight)
    assert record.x_TD.sum() == pair.a.sum() and len(maybe(y, y)) == 2
    ones = torch.ones(4, 2)
    assert torch.equal(gather(split(ones, mesh), mesh, ShardShape.even(4, 1)), ones)
    assert str(placement_of(Hidden)) == "edp:R ep:S(0) etp:S(1)"
    assert str(placements_of(Gate)["weight_ED"]) == "dp:R tp:I"


if __name__ == "__main__":
    main()
