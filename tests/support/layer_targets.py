"""Targets for the checks: the layer, in the ways that it is used."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, ShardShape, init_weights
from spmd_moe.check import Case
from spmd_moe.core.placement import CP, DP, TP, I, Kind, Placement, R, S, V
from spmd_moe.layer.boundary import INSIDE

SMALL = MoEConfig(16, 48, RouterConfig(24, 2), balance="batch")


def layer(config: MoEConfig = SMALL) -> Callable[[MoEMesh, int], Case]:
    """A target of the layer; the tokens are placed on tp as the config's `src` says."""

    def target(mesh: MoEMesh, tokens: int) -> Case:
        module = MoE(config, mesh)
        init_weights(module, mesh, seed=0)
        tp = mesh[TP]
        rows = tokens if config.src in (R, I) else ShardShape.even(tokens, tp.size).sizes[tp.rank]
        x = torch.randn(rows, config.dim, dtype=torch.float32)
        return Case(module, (x,), (Placement((DP[V], CP[V], TP[_on_tp(config.src)])),))

    return target


def _on_tp(kind: Kind) -> Kind:
    return S(0) if kind == INSIDE else kind


def small(mesh: MoEMesh, tokens: int) -> Case:
    """Small enough for every layout of 8 ranks."""
    return layer()(mesh, tokens)
