"""What does not go together in an operation, seen by the plugin: each marked line, and no other."""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from spmd_moe import DP, TP, I, P, Placed, R, S, V
from spmd_moe.core.placement import Rows, Tokens, TokenSums, Whole

OnTP = Placed[Tensor, TP[R]]
Sums = Placed[Tensor, TP[P]]
Same = Placed[Tensor, TP[I]]
Own = Placed[Tensor, TP[V]]


def sums_meet_others(p: Sums, q: Sums, r: OnTP, v: Own, i: Same) -> None:
    _ = p + q
    _ = p * r
    _ = p @ r
    _ = p / 2
    _ = p.sum() * 3.0
    _ = torch.cat([p, q])
    _ = torch.addmm(p, p, r)
    _ = p + r  # E: placement-operation
    _ = p + v  # E: placement-operation
    _ = p + i  # E: placement-operation
    _ = p * q  # E: placement-operation
    _ = p @ q  # E: placement-operation
    _ = r / p  # E: placement-operation
    _ = 2 / p  # E: placement-operation
    _ = p + 1  # E: placement-operation
    _ = 1 - p  # E: placement-operation
    _ = p - 1.5  # E: placement-operation
    _ = torch.cat([p, r])  # E: placement-operation
    _ = torch.stack((p, v))  # E: placement-operation
    _ = torch.addmm(r, p, r)  # E: placement-operation
    p += r  # E: placement-operation


def sums_are_linear(p: Sums) -> None:
    _ = p.T.flatten().unsqueeze(0).chunk(2)[0].clone()
    _ = fn.silu(p)  # E: placement-operation
    _ = p.relu()  # E: placement-operation
    _ = p.softmax(0)  # E: placement-operation
    _ = p.max()  # E: placement-operation
    _ = p.topk(2)  # E: placement-operation
    _ = p == 2  # E: placement-operation
    _ = p < p  # E: placement-operation
    _ = p**2  # E: placement-operation
    _ = abs(p)  # E: placement-operation
    _ = p[0]  # E: placement-operation
    _ = p.to(torch.float64)  # E: placement-operation
    _ = fn.linear(p, p)  # E: placement-operation
    _ = torch.exp(input=p)  # E: placement-operation
    _ = p.item()  # E: placement-operation


def its_size_is_no_part_of_a_sum(p: Sums) -> None:
    if p.numel() and p.dim() and p.size(0) and p.is_contiguous():
        p.requires_grad_(True).relu()  # E: placement-operation
    for row in p:
        _ = row + p
        _ = row.relu()  # E: placement-operation
    one, other = p
    _ = one + other
    _ = one * other  # E: placement-operation


def invariant_mixes_with_nothing(i: Same, r: OnTP, v: Own) -> None:
    _ = i + i
    _ = i * 2
    _ = i * r  # E: placement-operation
    _ = v + i  # E: placement-operation
    _ = fn.linear(v, i)  # E: placement-operation
    _ = torch.where(v > 0, v, i)  # E: placement-operation


def in_place(r: OnTP, v: Own, p: Sums) -> None:
    v.add_(r)
    r.add_(v)  # E: placement-operation
    r += v  # E: placement-operation
    r[0] = v  # E: placement-operation
    p.mul_(2)
    p.add_(1)  # E: placement-operation


def one_axis_is_enough(x: Tokens, sums: TokenSums, whole: Whole, rows: Rows) -> None:
    _ = x * whole
    _ = x + sums  # E: placement-operation
    _ = rows * x  # the same on every axis of each mesh
    _ = rows + sums  # E: placement-operation
    _ = sums * sums  # E: placement-operation


def one_mistake_is_one_error(p: Sums) -> Placed[Tensor, TP[R]]:
    hidden = fn.gelu(p)  # E: placement-operation
    return (hidden * 2).softmax(0) + 1


def losses(loss: Placed[Tensor, DP[P], TP[I]], wrong: Placed[Tensor, DP[V]]) -> None:
    loss.backward()
    wrong.backward()  # E: placement-operation


def sharded(x: Placed[Tensor, TP[S[0]]], p: Sums) -> None:
    _ = x * 2 + x
    _ = x.to(torch.float64) + p  # E: placement-operation


def changed_where_others_hold_it(x: Tokens, w: Whole) -> None:
    w[0] = x  # E: placement-operation
    part = w[0]
    part.add_(x)  # E: placement-operation
    copy = w.clone()
    copy.add_(x)
    if x.numel():
        w = w * x  # E: placement-assignment


class OfTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, sums: TokenSums) -> None:
        self.norm(sums)  # E: placement-operation
