"""The whole layer as a student would write it: one process, float64, a loop over tokens.

Every layout, dispatcher and kernel of the package is compared with this. Weights are global: all
experts, whole hidden dims. Gradients come from autograd through the loops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from spmd_moe.layer.router import RouterConfig


def scores_of(logits: Tensor, config: RouterConfig) -> Tensor:
    """One token's score of every expert."""
    every = {
        "softmax": logits.softmax(0),
        "sigmoid": logits.sigmoid(),
        "sqrt_softplus": F.softplus(logits).sqrt(),
    }
    return every.get(config.score_func, logits)


def choose(scores: Tensor, bias: Tensor, config: RouterConfig) -> list[int]:
    """The token's experts, best first."""
    rank = (scores + bias).tolist()
    size = config.num_experts // config.num_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_expert_groups)]
    best = [
        sum(sorted((rank[e] for e in g), reverse=True)[: config.group_score_top_k]) for g in groups
    ]
    kept = sorted(range(config.num_expert_groups), key=lambda g: -best[g])[
        : config.num_limited_groups
    ]
    allowed = [e for g in kept for e in groups[g]]
    return sorted(allowed, key=lambda e: -rank[e])[: config.top_k]


def weights_of(scores: Tensor, ids: list[int], config: RouterConfig) -> Tensor:
    chosen = scores[ids]
    if config.score_func == "softmax_chosen":
        chosen = chosen.softmax(0)
    if config.route_norm:
        chosen = chosen / chosen.sum()
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


def moe(
    x_TD: Tensor, w: Mapping[str, Tensor], config: RouterConfig, mask_T: Tensor, ids_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's output and the choices of each expert. Ids below 0: -1 no expert, -2 choose."""
    rows, counts = [], torch.zeros(config.num_experts, dtype=torch.int64)
    for x, real, given in zip(x_TD, mask_T.tolist(), ids_TK.tolist(), strict=True):
        y = x * 0
        if real:
            scores = scores_of(w["router.weight_ED"] @ x, config)
            ids = choose(scores, w["router.bias_E"], config) if -2 in given else given
            ids = [e for e in ids if e >= 0]
            for weight, e in zip(weights_of(scores, ids, config), ids, strict=True):
                y = y + weight * expert(x, w, e)
                counts[e] += 1
            y = y + shared(x, w) if "shared.w1_FD" in w else y
        rows.append(y)
    return torch.stack(rows) if rows else x_TD * 1.0, counts
