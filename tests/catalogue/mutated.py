"""A step of training with the layer, in configurations that together run nearly all its lines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spmd_moe.check import Case
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DP, TP, I, Placement, R, S, V
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.balance_losses import (
    balance_loss,
    reduce_loss_terms,
    z_loss,
)
from spmd_moe.layer.boundary import INSIDE
from spmd_moe.layer.dispatch import AllGather, DedupAllToAll, FixedCapacity
from spmd_moe.layer.expert_load import expert_load
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import MoEConfig, ScoreApplication, SharedConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.layer.selection_bias import update_selection_bias
from spmd_moe.train.init_weights import init_weights
from tests.catalogue.data import drawn

WIDTH, EXPERTS = 8, 8
ROUTER = RouterConfig(EXPERTS, 2, route_norm=True, route_scale=2.0)
GROUPED = RouterConfig(
    EXPERTS, 2, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2, route_norm=True
)
WITHIN = MoEConfig(WIDTH, 8, GROUPED, bias=True, balance="batch")
WHOLE = MoEConfig(
    WIDTH, 8, ROUTER, src=R, dst=I, shared=SharedConfig(8, gated=True), balance="sequence"
)
GATHERED = MoEConfig(WIDTH, 8, ROUTER, dst=R, score_application=ScoreApplication.IN_COMBINE)
SHARED = MoEConfig(WIDTH, 8, ROUTER, src=I, dst=R, shared=SharedConfig(8, gated=True, sharded=True))
FIXED = MoEConfig(WIDTH, 8, ROUTER, src=R, dst=I, balance="batch")


class Step(nn.Module):
    """A forward, everything that is made of its result, and the push to the bias."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor, ids: Tensor | None = None) -> dict[str, Tensor]:
        mesh = self.layer.mesh
        out = self.layer(x, mask, ids)
        load = expert_load(out, mesh)
        made = {"hidden": out.hidden, "counts": load.counts_E, "dropped": load.dropped}
        made |= {"entropy": load.entropy, "most": load.max_over_mean}
        if out.losses is not None:
            total = reduce_loss_terms(out.losses, mesh)
            made["balance"] = balance_loss(out.losses, total, mesh)
            made["z"] = z_loss(out.losses, total)
        with torch.no_grad():
            self.layer.router.seen_E += out.counts_E
        update_selection_bias([self.layer.router], mesh, 0.1)
        return made


def target(
    config: MoEConfig, dispatcher: str = "", replay: bool = False
) -> Callable[[MoEMesh, int], Case]:
    """Of sequences of two tokens, some of them masked; `replay` gives their experts, too."""

    def build(mesh: MoEMesh, tokens: int) -> Case:
        layer = MoE(config, mesh, _dispatcher(dispatcher, mesh, tokens))
        init_weights(layer, mesh, seed=0, std=0.5)
        tp = mesh[TP]
        inside = config.src == INSIDE
        rows = ShardShape.even(tokens, tp.size).sizes[tp.rank] if inside else tokens
        place = Placement((DP[V], CP[V], TP[S(0) if inside else config.src]))
        given = [drawn(1, rows, 2, WIDTH), drawn(2, rows, 2) > -0.3]
        if replay:
            given.append((drawn(3, rows, 2, 2) * 8).to(torch.int64).clamp(-1, EXPERTS - 1))
        return Case(Step(layer), tuple(given), (place,) * len(given))

    return build


def _dispatcher(
    name: str, mesh: MoEMesh, tokens: int
) -> AllGather | DedupAllToAll | FixedCapacity | None:
    if name == "gather":
        return AllGather(mesh, EXPERTS)
    if name == "dedup":
        return DedupAllToAll(mesh, EXPERTS)
    return FixedCapacity(mesh, EXPERTS, 4 * tokens) if name == "fixed" else None


TARGETS = {
    "within": target(WITHIN),
    "whole": target(WHOLE),
    "gathered": target(GATHERED, "gather", replay=True),
    "shared_experts": target(SHARED),
    "fixed": target(FIXED, "fixed"),
    "dedup": target(WITHIN, "dedup"),
    "dedup_late": target(GATHERED, "dedup"),
}
# A dispatcher is used by some of them alone.
USED_BY = {
    "dispatch.local": ("within", "whole"),
    "dispatch.all_gather": ("gathered",),
    "dispatch.ragged_exchange": ("within", "dedup"),
    "dispatch.all_to_all": ("within", "whole"),
    "dispatch.dedup_all_to_all": ("dedup", "dedup_late"),
    "dispatch.fixed_capacity": ("fixed",),
}
