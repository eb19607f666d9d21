"""The whole layer as a student would write it: one process, float64, a loop over tokens.

Every layout, dispatcher and kernel of the package is compared with this. Weights are global: all
experts, whole hidden dims. Gradients come from autograd through the loops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from spmd_moe.layer.moe_config import MoEConfig, ScoreApplication
from spmd_moe.layer.router_config import RouterConfig


def scores_of(logits: Tensor, score: str) -> Tensor:
    """One token's score of every expert."""
    every = {
        "softmax": logits.softmax(0),
        "sigmoid": logits.sigmoid(),
        "sqrt_softplus": F.softplus(logits).sqrt(),
    }
    return every.get(score, logits)


def choose(logits: Tensor, bias: Tensor, config: RouterConfig) -> list[int]:
    """The token's experts, best first."""
    rank = (scores_of(logits, config.choose_by or config.score_func) + bias).tolist()
    size = config.num_choices // config.num_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_expert_groups)]
    best = [
        sum(sorted((rank[e] for e in g), reverse=True)[: config.group_score_top_k]) for g in groups
    ]
    kept = sorted(range(config.num_expert_groups), key=lambda g: -best[g])[
        : config.num_limited_groups
    ]
    for g in set(range(config.num_expert_groups)) - set(kept):
        for e in groups[g]:
            rank[e] = config.excluded_score
    return sorted(range(config.num_choices), key=lambda e: -rank[e])[: config.top_k]


def weights_of(scores: Tensor, ids: list[int], config: RouterConfig) -> Tensor:
    chosen = scores[ids]
    if config.score_func == "softmax_chosen":
        chosen = chosen.softmax(0)
    if config.route_norm:
        chosen = chosen / (chosen.sum() + config.norm_eps)
    return chosen * config.route_scale


def linear(x: Tensor, w: Mapping[str, Tensor], weight: str, bias: str, e: int) -> Tensor:
    return w[weight][e] @ x + (w[bias][e] if bias in w else 0)


def expert(x: Tensor, w: Mapping[str, Tensor], e: int) -> Tensor:
    """SwiGLU of one token."""
    gate = linear(x, w, "experts.w1_eFD", "experts.b1_eF", e)
    up = linear(x, w, "experts.w3_eFD", "experts.b3_eF", e)
    return linear(F.silu(gate) * up, w, "experts.w2_eDF", "experts.b2_eD", e)


def shared(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    y = w["shared.w2_DF"] @ (F.silu(w["shared.w1_FD"] @ x) * (w["shared.w3_FD"] @ x))
    return y * torch.sigmoid(w["shared.gate_1D"] @ x) if "shared.gate_1D" in w else y


def routed(
    x: Tensor, weights: Tensor, ids: list[int], w: Mapping[str, Tensor], config: MoEConfig
) -> Tensor:
    """The sum of what the experts of one token give."""
    y = x * 0
    for weight, e in zip(weights, ids, strict=True):
        if "router.scale_E" in w:
            weight = weight * w["router.scale_E"][e]
        if e >= config.router.num_experts:  # an identity expert
            y = y + weight * x
        elif config.score_application is ScoreApplication.ON_INPUT:
            y = y + expert(weight * x, w, e)
        else:
            y = y + weight * expert(x, w, e)
    return y


def moe(
    tokens: Mapping[str, Tensor],
    w: Mapping[str, Tensor],
    config: MoEConfig,
    mask_T: Tensor,
    ids_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    """The layer's output and the choices of each expert. Ids below 0: -1 no expert, -2 choose.

    `tokens`: `x`, and what else the layer's forward takes with it.
    """
    router, x_TD = config.router, tokens["x"]
    rows, counts = [], torch.zeros(router.num_choices, dtype=torch.int64)
    for t, (x, real, given) in enumerate(zip(x_TD, mask_T.tolist(), ids_TK.tolist(), strict=True)):
        y = x * 0
        if real:
            if router.given:
                ids = [e for e in given if e >= 0]
                weights = tokens["expert_weights"][t][[k for k, e in enumerate(given) if e >= 0]]
            else:
                logits = w["router.weight_ED"] @ tokens.get("router_input", x_TD)[t]
                if router.logit_softcap is not None:
                    logits = router.logit_softcap * torch.tanh(logits / router.logit_softcap)
                ids = choose(logits, w["router.bias_E"], router) if -2 in given else given
                ids = [e for e in ids if e >= 0]
                weights = weights_of(scores_of(logits, router.score_func), ids, router)
            y = routed(x, weights, ids, w, config)
            for e in ids:
                counts[e] += 1
            y = y + shared(x, w) if "shared.w1_FD" in w else y
        rows.append(y)
    return torch.stack(rows) if rows else x_TD * 1.0, counts
