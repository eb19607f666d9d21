"""Shared experts: a feed-forward network that every token passes, beside the routed experts.

Whole on every rank of tp, each rank computes its own tokens. Sharded on the hidden dim, each rank
computes its share of the sum for the tokens of all ranks, and one reduce-scatter adds the shares.
"""

# Shape letters in this file:
#   T  tokens    D  model width    F  hidden width, on this rank

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as fn
from torch import nn

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.compute_dtype import sum_dtype
from spmd_moe.core.mesh import Axis, MoEMesh
from spmd_moe.core.placement import (
    TP,
    GatheredTokens,
    HiddenInWeight,
    HiddenOutWeight,
    I,
    P,
    R,
    S,
    SharedWeight,
    Tokens,
    Whole,
)
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.core.validate import split_evenly
from spmd_moe.layer.activations import Activation
from spmd_moe.layer.routing_faults import nan_parameter


@final
class ReplicatedShared(nn.Module):
    """Every rank has all of it."""

    w1_FD: SharedWeight
    w3_FD: SharedWeight | None
    w2_DF: SharedWeight
    gate_1D: SharedWeight | None

    def __init__(
        self, dim: int, hidden_dim: int, activation: Activation, gated: bool, mesh: MoEMesh
    ) -> None:
        super().__init__()
        self.tp, self.activation = mesh[TP], activation
        self.w1_FD = nan_parameter(hidden_dim, dim)
        self.w3_FD = nan_parameter(hidden_dim, dim) if activation.gated else None
        self.w2_DF = nan_parameter(dim, hidden_dim)
        self.gate_1D = nan_parameter(1, dim) if gated else None

    def forward(self, x_TD: Tokens, shape: ShardShape | None) -> Tokens:
        gate_TF = fn.linear(x_TD, self._whole(self.w1_FD))
        up_TF = None if self.w3_FD is None else fn.linear(x_TD, self._whole(self.w3_FD))
        h_TF: Tokens = self.activation.forward(gate_TF, up_TF)
        y_TD = fn.linear(h_TF, self._whole(self.w2_DF))
        return _gate(y_TD, x_TD, self.gate_1D, self.tp)

    def _whole(self, weight: SharedWeight) -> Whole:
        return redistribute(weight, self.tp, src=I, dst=R, grad_dtype=sum_dtype(weight))


@final
class ShardedShared(nn.Module):
    """Every rank has a share of the hidden dim."""

    w1_FD: HiddenInWeight
    w3_FD: HiddenInWeight | None
    w2_DF: HiddenOutWeight
    gate_1D: SharedWeight | None

    def __init__(
        self, dim: int, hidden_dim: int, activation: Activation, gated: bool, mesh: MoEMesh
    ) -> None:
        super().__init__()
        self.tp, self.activation = mesh[TP], activation
        F = split_evenly("ShardedShared", "hidden_dim", hidden_dim, self.tp)
        self.w1_FD = nan_parameter(F, dim)
        self.w3_FD = nan_parameter(F, dim) if activation.gated else None
        self.w2_DF = nan_parameter(dim, F)
        self.gate_1D = nan_parameter(1, dim) if gated else None

    def forward(self, x_TD: Tokens, shape: ShardShape | None) -> Tokens:
        all_TD: GatheredTokens = redistribute(
            x_TD, self.tp, src=S(0), dst=R, shape=shape, grad_dtype=sum_dtype(x_TD)
        )
        gate_TF = fn.linear(all_TD, self.w1_FD)
        up_TF = None if self.w3_FD is None else fn.linear(all_TD, self.w3_FD)
        h_TF: Tokens = self.activation.forward(gate_TF, up_TF)
        part_TD = fn.linear(h_TF, self.w2_DF)
        part_TD = declare_sum(part_TD, self.tp)  # each rank has summed over its hidden share
        y_TD = redistribute(
            part_TD, self.tp, src=P, dst=S(0), shape=shape, dtype=sum_dtype(part_TD)
        )
        return _gate(y_TD, x_TD, self.gate_1D, self.tp)


def _gate(y_TD: Tokens, x_TD: Tokens, gate_1D: SharedWeight | None, tp: Axis) -> Tokens:
    """Let each token say how much of it comes through."""
    if gate_1D is None:
        return y_TD
    whole_1D: Whole = redistribute(gate_1D, tp, src=I, dst=R, grad_dtype=sum_dtype(gate_1D))
    return y_TD * torch.sigmoid(fn.linear(x_TD, whole_1D))
