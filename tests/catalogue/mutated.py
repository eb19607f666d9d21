"""The layer in four configurations that together run nearly every line of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spmd_moe.boundary import INSIDE
from spmd_moe.check import Built
from spmd_moe.dispatch import AllGather
from spmd_moe.experts import Weigh
from spmd_moe.init import init_weights
from spmd_moe.mesh import MoEMesh
from spmd_moe.moe import MoE, MoEConfig, SharedConfig
from spmd_moe.placement import CP, DP, TP, I, Placement, R, S, V
from spmd_moe.router import RouterConfig
from spmd_moe.shard import ShardShape

ROUTER = RouterConfig(8, 2, normalize=True, scale=2.0)
WITHIN = MoEConfig(8, 8, ROUTER, bias=True, balance="batch")
WHOLE = MoEConfig(
    8, 8, ROUTER, src=R, dst=I, shared=SharedConfig(8, gated=True), balance="sequence"
)
GATHERED = MoEConfig(8, 8, ROUTER, dst=R, weigh=Weigh.IN_COMBINE)
SHARED = MoEConfig(8, 8, ROUTER, src=I, dst=R, shared=SharedConfig(8, gated=True, sharded=True))


def target(
    config: MoEConfig, gather: bool = False, replay: bool = False
) -> Callable[[MoEMesh, int], Built]:
    """Of tokens of which one in four is masked; `replay` gives their experts, too."""

    def build(mesh: MoEMesh, tokens: int) -> Built:
        layer = MoE(config, mesh, AllGather(mesh, 8) if gather else None)
        init_weights(layer, mesh, seed=0, std=0.5)
        tp = mesh[TP]
        inside = config.src == INSIDE
        rows = ShardShape.even(tokens, tp.size).sizes[tp.rank] if inside else tokens
        kind = S(0) if inside else config.src
        place = Placement((DP[V], CP[V], TP[kind]))
        given = [torch.randn(rows, 8), torch.rand(rows) < 0.75]
        if replay:
            given.append(torch.randint(-1, 8, (rows, 2)))
        return Built(layer, tuple(given), (place,) * len(given))

    return build


ALL = [target(WITHIN), target(WHOLE), target(GATHERED, gather=True, replay=True), target(SHARED)]
