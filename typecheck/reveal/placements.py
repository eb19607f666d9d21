"""What is inferred for undeclared expressions: each marked line has the placement after N."""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from spmd_moe import DP, TP, I, MoEMesh, P, Placed, R, S, V, redistribute
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
