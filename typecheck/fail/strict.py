"""Strict mode, which pyproject.toml asks for here: all is placed, nothing goes past the checker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import spmd_types
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmd_moe import DP, TP, I, MoEMesh, P, Placed, R, S, V, redistribute
from spmd_moe.core.placement import RouterWeight, Tokens, TokenSums, Whole

T = TypeVar("T", bound=Tensor)


def stranger(x: Tensor) -> Tensor:  # E: placement-unknown
    return x * 2


def parameters(x: Tokens, y: Tensor | None, n: int) -> None:  # E: placement-unknown
    print(x, y, n)


class Gate(nn.Module):
    weight: RouterWeight
    bias: Tensor  # E: placement-unknown

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tokens) -> Tokens:
        y = stranger(x)  # E: placement-unknown
        z: Tokens = stranger(x)
        _ = y + y
        _ = x + self.bias  # E: placement-unknown
        return z


@dataclass
class Record:
    x: Tokens
    y: Tensor  # E: placement-unknown


def made(x: Tokens, anything: Any) -> Record:
    _ = torch.rand(3)  # E: placement-unknown
    _ = torch.empty(3)  # E: placement-unknown
    _ = torch.zeros(3) * x
    _ = cast(Tensor, anything(x))  # E: placement-unknown
    _ = anything(x)  # E: placement-unknown
    _ = anything(3)
    return Record(x, stranger(x))


def generic(x: T) -> T:
    return cast(T, x.flatten() * 2)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach() * 2


def allowed(x: Tokens) -> Tokens:
    _ = stranger(x)  # spmd: allow unknown - it is told here that there is a reason
    _ = stranger(x)  # spmd: allow unknown  # E: placement-allow, placement-unknown
    _ = stranger(x)  # spmd: allow size - 1  # E: placement-allow, placement-unknown
    return x


def past_the_checker(x: Tokens, sums: TokenSums, mesh: MoEMesh) -> None:
    group = mesh[TP].group
    dist.all_reduce(x, group=group)  # E: placement-bypass
    dist.all_gather_into_tensor(x, x, group)  # E: placement-bypass
    _ = dist.get_rank(group)
    _ = x.detach()  # E: placement-bypass
    _ = x.data  # E: placement-bypass
    with torch.no_grad():  # E: placement-bypass
        _ = redistribute(sums, mesh[TP], src=P, dst=R)
    with torch.no_grad():
        _ = x * 2
    with spmd_types.no_typecheck():  # E: placement-bypass
        print(x)


@torch.no_grad()
def no_gradient(sums: TokenSums, mesh: MoEMesh) -> Placed[Tensor, TP[R]]:  # E: placement-bypass
    return redistribute(sums, mesh[TP], src=P, dst=R)


def by_rank(x: Whole, mesh: MoEMesh) -> None:
    tp = mesh[TP]
    rows = x.shape[0] // tp.size
    _ = x.chunk(tp.size)[tp.rank]  # E: placement-size
    _ = x[tp.rank * rows : (tp.rank + 1) * rows]  # E: placement-size
    _ = x.narrow(0, tp.rank * rows, rows)  # E: placement-size
    mine = dist.get_rank(tp.group)
    _ = x[mine]  # E: placement-size
    _ = x.select(0, mine + 1)  # E: placement-size
    _ = x[rows]
    seed = 3 + mine
    print(seed)


def by_value(x: Tokens) -> None:
    n = int(x.sum())
    _ = torch.zeros(n)  # E: placement-size
    _ = x.new_ones(x.max().item(), 2)  # E: placement-size, arg-type
    _ = x.view(n, -1)  # E: placement-size
    print(n)


def by_shape(x: Placed[Tensor, DP[V], TP[S[0]]], total: int, mesh: MoEMesh) -> None:
    y = x
    if x.shape[0] != total:  # E: placement-size
        y = redistribute(x, mesh[TP], src=S(0), dst=I)  # E: placement-branch
    print(y)


def left_early(x: Placed[Tensor, DP[V], TP[S[0]]], mesh: MoEMesh) -> Placed[Tensor, DP[V], TP[R]]:
    if x.shape[0] > 9:
        raise ValueError
    if mesh[TP].size == 1:
        print(x)
    if x.shape[0] == 0:  # E: placement-size
        return torch.zeros(9)
    return redistribute(x, mesh[TP], src=S(0), dst=R)


def skipped(parts: list[Tokens], mesh: MoEMesh) -> None:
    for x in parts:
        if len(x) == 0:  # E: placement-size
            continue
        print(redistribute(x, mesh[TP], src=S(0), dst=R))
    for y in parts:
        if len(y) == 0:
            continue
        print(y)
