"""What is inferred for undeclared expressions: each marked line has the placement after N."""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from spmd_moe import (
    DP,
    TP,
    I,
    MoEMesh,
    P,
    Placed,
    R,
    S,
    V,
    declare_placements,
    redistribute,
)
from spmd_moe.core.placement import RouterWeight, Tokens, TokenSums, Whole

Own = Placed[Tensor, TP[S[0]]]


def operations(x: Tokens, w: Whole, sums: TokenSums, i: Placed[Tensor, TP[I]]) -> None:
    reveal_type(x * w)  # N: DP[V] CP[V] TP[V]
    reveal_type(w @ w.T)  # N: DP[R] CP[R] TP[R]
    reveal_type(sums * w)  # N: DP[P] CP[P] TP[P]
    reveal_type(2 * sums)  # N: DP[P] CP[P] TP[P]
    reveal_type(-sums)  # N: DP[P] CP[P] TP[P]
    reveal_type(i.exp())  # N: TP[I]
    reveal_type(fn.linear(x, w))  # N: DP[V] CP[V] TP[V]
    reveal_type(torch.where(x > 0, w, 0))  # N: DP[V] CP[V] TP[V]
    reveal_type(x[0, :2])  # N: DP[V] CP[V] TP[V]
    reveal_type(w[x])  # N: DP[V] CP[V] TP[V]
    reveal_type(torch.ones(3))  # N: *[R]
    reveal_type(torch.ones(3) * x)  # N: DP[V] CP[V] TP[V]
    reveal_type(x.new_zeros(3))  # N: *[R]
    reveal_type(torch.zeros_like(x))  # N: DP[V] CP[V] TP[V]
    reveal_type(torch.cat([x, x]))  # N: DP[V] CP[V] TP[V]
    reveal_type(torch.cat([w, x], dim=0))  # N: DP[V] CP[V] TP[V]
    reveal_type(x if w.numel() else x)  # N: DP[V] CP[V] TP[V]


def several(x: Tokens, sums: TokenSums) -> None:
    values, indices = x.topk(2)
    reveal_type(indices)  # N: DP[V] CP[V] TP[V]
    reveal_type(values)  # N: DP[V] CP[V] TP[V]
    reveal_type(torch.sort(x).values)  # N: DP[V] CP[V] TP[V]
    reveal_type(x.sort()[1])  # N: DP[V] CP[V] TP[V]
    first, *others = sums.split(2)
    reveal_type(first)  # N: DP[P] CP[P] TP[P]
    reveal_type(others[0])  # N: DP[P] CP[P] TP[P]
    for part in sums.unbind(0):
        reveal_type(part)  # N: DP[P] CP[P] TP[P]
    reveal_type([2 * part for part in sums.chunk(2)][0])  # N: DP[P] CP[P] TP[P]


def shards(x: Own) -> None:
    reveal_type(x.clone())  # N: TP[S[0]]
    reveal_type(x.to(torch.float64))  # N: TP[S[0]]
    reveal_type(x.T)  # N: TP[V]
    reveal_type(x.sum(0))  # N: TP[V]


def gradients(loss: Placed[Tensor, DP[P], TP[I]], x: Tokens, w: Whole) -> None:
    reveal_type(loss.grad)  # N: DP[R] TP[I]
    reveal_type(w.grad)  # N: DP[P] CP[P] TP[P]
    reveal_type(x.grad)  # N: DP[V] CP[V] TP[V]


def moves(x: Tokens, sums: TokenSums, mesh: MoEMesh) -> None:
    reveal_type(redistribute(x, mesh[TP], src=S(0), dst=R))  # N: DP[V] CP[V] TP[R]
    reveal_type(redistribute(sums, mesh[DP], src=P, dst=S[1]))  # N: CP[P] TP[P] DP[S[1]]
    y = x * 2
    y = redistribute(y, mesh[TP], src=S(0), dst=I)
    reveal_type(y)  # N: DP[V] CP[V] TP[I]


def partly(x: Placed[Tensor, DP[V]], y: Placed[Tensor, TP[R]]) -> None:
    reveal_type(x * y)  # N: DP[V]
    reveal_type(x + torch.ones(2))  # N: DP[V]


class Gate(nn.Module):
    weight: RouterWeight
    both: tuple[Tokens, Whole]

    def forward(self, x: Tokens) -> tuple[Tokens, TokenSums]:
        reveal_type(self.weight.T)  # N: DP[R] CP[R] TP[I]
        reveal_type(self.both[1])  # N: DP[R] CP[R] TP[R]
        return self(x)


def modules(gate: Gate, x: Tokens) -> None:
    reveal_type(gate(x)[1])  # N: DP[P] CP[P] TP[P]


def unannotated(x: Tokens) -> Placed[Tensor, DP[V]]:
    h = x.flatten()
    act = torch.sigmoid(h) * 2
    reveal_type(act)  # N: DP[V] CP[V] TP[V]
    return act


def maybe(x: Tokens | None, v: Placed[Tensor, TP[V]] | None) -> None:
    if x is not None:
        reveal_type(x * 2)  # N: DP[V] CP[V] TP[V]
    reveal_type(v)  # N: TP[V]


def sums_that_grow(x: Tokens, w: Whole, mesh: MoEMesh, at: Whole) -> None:
    apart = torch.zeros_like(w)
    inside = torch.zeros_like(w)
    added = torch.zeros(3)
    written = w.new_zeros(3)
    kept = torch.zeros_like(w)
    for _ in range(2):
        before = apart * 2
        reveal_type(before)  # N: DP[V] CP[V] TP[V]
        apart = apart.index_add(0, at, x)
        inside.index_add_(0, at, x)
        added += x
        kept = kept.index_add(0, at, w)
    written[0] = x
    reveal_type(apart)  # N: DP[V] CP[V] TP[V]
    reveal_type(inside)  # N: DP[V] CP[V] TP[V]
    reveal_type(added)  # N: DP[V] CP[V] TP[V]
    reveal_type(written)  # N: DP[V] CP[V] TP[V]
    reveal_type(kept)  # N: DP[R] CP[R] TP[R]
    x = redistribute(x, mesh[TP], src=S(0), dst=R)
    reveal_type(x)  # N: DP[V] CP[V] TP[R]
    declared: Tokens = torch.zeros_like(w)
    reveal_type(declared * 1)  # N: DP[V] CP[V] TP[V]


def items_of_pythons_functions(x: Tokens, w: Whole) -> None:
    for _, row in enumerate(x):
        reveal_type(row)  # N: DP[V] CP[V] TP[V]
    for one, other in zip(x, w, strict=True):
        reveal_type(one)  # N: DP[V] CP[V] TP[V]
        reveal_type(other)  # N: DP[R] CP[R] TP[R]
    for _, (one, other) in enumerate(zip([x, x], w, strict=True), 1):
        reveal_type(one)  # N: DP[V] CP[V] TP[V]
        reveal_type(other)  # N: DP[R] CP[R] TP[R]
    reveal_type(list(w)[0])  # N: DP[R] CP[R] TP[R]


def made_elsewhere() -> nn.Module:
    return nn.Identity()


class OfTorch(nn.Module):
    """Modules of torch's own, with declared parameters and without."""

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.1)
        self.embed = nn.Embedding(10, 8)
        self.mix = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.other = nn.Sequential(nn.Linear(8, 8), OfTorch(mesh))
        self.attention = nn.MultiheadAttention(8, 2)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.made = nn.ModuleList([nn.Sequential(made_elsewhere(), nn.SiLU())])
        declare_placements(
            self, {"norm.*": Placed[Tensor, DP[R], TP[V]], "embed.weight": RouterWeight}
        )

    def forward(self, x: Tokens, w: Placed[Tensor, DP[R], TP[I]]) -> None:
        reveal_type(self.norm(x))  # N: DP[V] CP[V] TP[V]
        reveal_type(self.norm(torch.ones(3)))  # N: DP[R] TP[V]
        reveal_type(self.embed(w))  # N: DP[R] TP[I]
        reveal_type(self.drop(w))  # N: DP[R] TP[I]
        reveal_type(self.mix(w))  # N: TP[I]
        reveal_type(self.attention(x, x, x)[0])  # N: DP[V] CP[V] TP[V]
        h = w * 1
        for layer in self.layers:
            h = layer(h)
        reveal_type(h)  # N: DP[R] TP[I]
        reveal_type(self.layers[0](x))  # N: DP[V] CP[V] TP[V]
        other: Whole = self.made[0](x)  # nothing is known of what was made elsewhere
        reveal_type(other)  # N: DP[R] CP[R] TP[R]
