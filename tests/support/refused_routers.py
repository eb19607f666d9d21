"""Settings of routers that contradict each other, and calls that lack what a router reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights

_GIVEN, _IDS = RouterConfig(8, 2, given=True), torch.zeros(3, 2, dtype=torch.int64)


def routed(**settings: object) -> Callable[[], object]:
    return lambda: RouterConfig(**({"num_experts": 8, "top_k": 2} | settings))  # type: ignore[arg-type]  # wrong on purpose


def given(
    router: RouterConfig = _GIVEN, ids: Any = _IDS, unasked: bool = False, **more: Any
) -> Callable[[], Any]:
    """A call of a layer with ids and weights, of which some are wrong."""

    def act() -> object:
        layer = MoE(MoEConfig(4, 8, router), MoEMesh.single())
        init_weights(layer, layer.mesh, seed=0)
        weights = {} if unasked else {"expert_weights": torch.ones(3, 2)}
        return layer(torch.ones(3, 4), None, ids, **(weights | more))

    return act


BAD_ROUTERS: dict[str, Callable[[], object]] = {
    "router_no_experts": routed(num_experts=0),
    "router_top_k": routed(top_k=9),
    "router_score": routed(score_func="hard"),
    "router_dead_gradient": routed(top_k=1, route_norm=True),
    "router_groups": routed(num_expert_groups=3),
    "router_groups_kept": routed(num_expert_groups=2, num_limited_groups=3),
    "router_groups_too_small": routed(num_expert_groups=4, num_limited_groups=1, top_k=3),
    "router_dtype": routed(dtype=torch.bfloat16),
    "router_scale": routed(route_scale=float("nan")),
    "router_jitter": routed(jitter=1.5),
    "router_zero_experts_in_groups": routed(num_expert_groups=2, num_zero_experts=2),
    "router_softcap": routed(logit_softcap=0.0),
    "router_choose_by": routed(choose_by="softmax_chosen"),
    "router_norm_eps": routed(norm_eps=-1.0),
    "router_norm_eps_of_no_norm": routed(norm_eps=1e-6),
    "router_excluded_score": routed(excluded_score=float("nan")),
    "router_given": routed(given=True, score_func="sigmoid"),
    "config_balance_of_given": lambda: MoEConfig(
        4, 8, RouterConfig(8, 2, given=True), balance="batch"
    ),
    "moe_ids_not_given": given(ids=None),
    "moe_weights_not_given": given(expert_weights=None),
    "moe_weights_shape": given(expert_weights=torch.ones(3, 1)),
    "moe_weights_dtype": given(expert_weights=torch.ones(3, 2, dtype=torch.int64)),
    "moe_weights_unasked": given(router=RouterConfig(8, 2)),
    "moe_router_input_not_given": given(router=RouterConfig(8, 2, input_dim=5), unasked=True),
    "moe_router_input_unasked": given(router_input=torch.ones(3, 5)),
    "router_group_best": routed(num_expert_groups=2, group_score_top_k=3),
}
