"""Bugs that Mixture-of-Experts layers have had, in the shape of ours; strict, by pyproject.toml.

Each function is named after its entry in the project's catalogue of such bugs.
"""

# Shape letters in this file:
#   T  tokens    D  model width    E  experts    K  experts per token    R  rows at the experts

from __future__ import annotations

from typing import NewType

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from spmd_moe import DP, TP, I, MoEMesh, P, Placed, R, S, V, redistribute
from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.placement import (
    DENSE,
    EDP,
    EP,
    ETP,
    RouterWeight,
    Rows,
    RowSums,
    Tokens,
    TokenSums,
    Whole,
)
from spmd_moe.layer.router import Router

SharedSums = Placed[Tensor, DP[V], TP[P]]
ExpertGradient = Placed[Tensor, EDP[P], EP[V], ETP[S[1]]]
ExpertUpdate = Placed[Tensor, EDP[R], EP[V], ETP[S[1]]]
Degree = NewType("Degree", int)
Experts = NewType("Experts", int)


class B01(nn.Module):
    """The gate's gradient is left as each rank's part of a sum on tp."""

    weight_ED: RouterWeight

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.tp = mesh[TP]

    def forward(self, x_TD: Tokens) -> Tokens:
        return fn.linear(x_TD, self.weight_ED).softmax(1)  # E: placement-operation

    def by_rank(self, x_TD: Placed[Tensor, TP[I]]) -> Placed[Tensor, TP[V]]:
        scores_TE = fn.linear(x_TD, self.weight_ED).softmax(1)
        return scores_TE.chunk(self.tp.size)[self.tp.rank]  # E: placement-size, placement-return


def b03a(
    x_TD: Placed[Tensor, TP[I]], up_FD: Placed[Tensor, TP[S[0]]], ep: int, mesh: MoEMesh
) -> Placed[Tensor, TP[V]]:
    """The gradient of what the experts read is summed over tp only where there is ep."""
    rows_TD = x_TD if ep == 1 else redistribute(x_TD, mesh[TP], src=I, dst=R)  # E: placement-branch
    return fn.linear(rows_TD, up_FD)  # E: placement-operation


def b04a(x_RD: Rows, mesh: MoEMesh) -> Placed[Tensor, EP[R]]:
    """Rows of different tokens are summed."""
    return redistribute(x_RD, mesh[EP], src=P, dst=R)  # E: placement-move


def b05(x_TD: Placed[Tensor, TP[S[0]]], tokens: int, mesh: MoEMesh) -> Placed[Tensor, TP[R]]:
    """The layout is guessed from a length, which for one token is ambiguous."""
    if x_TD.shape[0] != tokens:  # E: placement-size
        x_TD = redistribute(x_TD, mesh[TP], src=S(0), dst=R)  # E: placement-assignment
    return x_TD  # E: placement-return


def b06d(ids_TK: Whole, mesh: MoEMesh) -> Whole:
    """Few tokens are kept whole, and their counts reduced all the same."""
    counts_E = fn.one_hot(ids_TK).sum(0)
    return redistribute(counts_E, mesh[TP], src=P, dst=R)  # E: placement-move


def b07(h_RD: Rows, bias_D: Placed[Tensor, ETP[R]], mesh: MoEMesh) -> RowSums:
    """A whole bias is added before the sum over etp."""
    y_RD = declare_sum(h_RD, mesh[ETP])
    return y_RD + bias_D  # E: placement-operation


def b08(y_TD: SharedSums, shared_TD: Placed[Tensor, DP[V], TP[R]], mesh: MoEMesh) -> Tokens:
    """A replicated shared expert is added to parts of a sum."""
    out_TD = y_TD + shared_TD  # E: placement-operation
    return redistribute(out_TD, mesh[TP], src=P, dst=S(0))


def b10(y_TD: Tokens, shared_TD: SharedSums) -> Tokens:
    """The shared expert is never reduced."""
    return y_TD + shared_TD  # E: placement-operation


def b08b(
    y_TD: Placed[Tensor, DP[V], TP[V]], shared_TD: Placed[Tensor, DP[V], TP[R]], mesh: MoEMesh
) -> Tokens:
    """The same where the routed part is not declared to be a part of a sum."""
    return redistribute(y_TD + shared_TD, mesh[TP], src=P, dst=S(0))  # E: placement-move


class B13(nn.Module):
    """The selection bias is moved by counts that are not summed over tp."""

    bias_E: Whole
    counts_E: TokenSums

    def update(self, mesh: MoEMesh) -> None:
        counts_E = redistribute(self.counts_E, mesh[DP], src=P, dst=R)
        self.bias_E.add_(torch.sign(counts_E.mean() - counts_E))  # E: placement-operation

    def on_some_axes(self, counts_E: Tokens) -> None:
        self.bias_E += torch.sign(counts_E.mean() - counts_E)  # E: placement-operation


def b14(counts_E: Tokens, mesh: MoEMesh) -> Tokens:
    """A reduction in place makes what was this rank's the sum of all."""
    torch.distributed.all_reduce(counts_E, group=mesh[TP].group)  # E: placement-bypass
    return counts_E


def b19a(gradient: ExpertGradient, mesh: MoEMesh) -> ExpertUpdate:
    """An expert's gradient is reduced over the group of the dense weights."""
    return redistribute(gradient, mesh[DP], src=P, dst=R)  # E: placement-return


def b20(gradients: list[Rows], mesh: MoEMesh) -> Placed[Tensor, EP[I]]:
    """The norm of the experts' gradients is not summed over ep."""
    squares = torch.stack([g.square().sum() for g in gradients]).sum()
    norm = declare_sum(squares, mesh[ETP])
    return redistribute(norm, mesh[ETP], src=P, dst=I).sqrt()  # E: placement-return


def b20d(gradients: list[Rows], mesh: MoEMesh) -> Placed[Tensor, EP[I]]:
    """The ranks' norms are averaged, where their squares should be added."""
    squares = torch.stack([g.square().sum() for g in gradients]).sum()
    norm = declare_sum(squares, mesh[EP]).sqrt()  # E: placement-operation
    return redistribute(norm, mesh[EP], src=P, dst=I) / mesh[EP].size


def b23(x_TD: Placed[Tensor, TP[R]], mesh: MoEMesh) -> Placed[Tensor, TP[S[0]]]:
    """Tokens that do not divide by the ranks are cut by hand."""
    tp = mesh[TP]
    return x_TD.chunk(tp.size)[tp.rank]  # E: placement-size, placement-return


def b32(scores_TK: Tokens, mesh: MoEMesh) -> Placed[Tensor, TP[R]]:
    """Probabilities are gathered where gradients are off."""
    with torch.no_grad():  # E: placement-bypass
        return redistribute(scores_TK, mesh[TP], src=S(0), dst=R)


def b36(ids_TK: Tokens, mask_T: Placed[Tensor, TP[P]]) -> Tokens:
    """The mask is placed otherwise than the tokens."""
    return torch.where(mask_T.unsqueeze(1), ids_TK, -1)  # E: placement-operation


def b36b(x_TD: Tokens, mask_T: Placed[Tensor, DP[V], TP[R]], router: Router) -> None:
    """The first rows of the mask of all tokens are taken for those of this rank."""
    print(router(x_TD, mask_T[: x_TD.shape[0]]))  # E: placement-argument


def b40(y_RD: RowSums, adapter_RD: Placed[Tensor, ETP[R]]) -> RowSums:
    """An adapter's branch is whole where the expert's is a part of a sum."""
    return y_RD + adapter_RD  # E: placement-operation


def b40b(
    gradient: Placed[Tensor, EDP[P], EP[P], ETP[R]], mesh: MoEMesh
) -> Placed[Tensor, EDP[R], EP[R], ETP[R]]:
    """The gradient of an adapter that all experts share is reduced over edp alone."""
    return redistribute(gradient, mesh[EDP], src=P, dst=R)  # E: placement-return


def b44(ep: Degree, experts: Experts) -> None:
    """The number of experts stands where the size of an axis is meant."""

    def axis(size: Degree) -> None:
        print(size)

    axis(ep)
    axis(experts)  # E: arg-type


def all_axes(counts_E: TokenSums, mesh: MoEMesh) -> Whole:
    """What is right: over a list of axes, which no type can follow, with a declared name."""
    whole_E: Whole = _summed(counts_E, mesh)
    return whole_E


# spmd: allow unknown - which axes is data
def _summed(x: Tensor, mesh: MoEMesh) -> Tensor:
    for axis in [mesh[role] for role in DENSE]:
        x = redistribute(x, axis, src=P, dst=R)
    return x


def own_rows(x_TD: Placed[Tensor, TP[R]], mesh: MoEMesh) -> Placed[Tensor, TP[V]]:
    return redistribute(x_TD, mesh[TP], src=R, dst=S(0))
