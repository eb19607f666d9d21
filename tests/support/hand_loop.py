"""A Mixture-of-Experts layer as a good engineer writes it by hand, to measure ours against.

Plain autograd, one expert after another, and only those that a token chose.
"""

# Shape letters in this file:
#   T  tokens     K  experts per token     D  model width     F  hidden width of an expert
#   E  experts    n  rows of one expert

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.layer.moe import MoE


def loop_layer(x_TD: Tensor, layer: MoE, top_k: int) -> Tensor:
    """The layer, by the weights of ours: softmax router, SwiGLU experts."""
    scores_TK, ids_TK = loop_router(x_TD, layer.router.weight_ED, top_k)
    return loop_experts(x_TD, scores_TK, ids_TK, expert_weights(layer))


def expert_weights(layer: MoE) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.experts.w3_eFD is not None
    return layer.experts.w1_eFD, layer.experts.w3_eFD, layer.experts.w2_eDF


def loop_router(x_TD: Tensor, weight_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The weights of the choices, and the choices. The gate is never narrower than float32."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return fn.linear(x_TD.to(wide), weight_ED.to(wide)).softmax(1).topk(top_k)


def loop_experts(
    x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor, weights: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Each expert over its tokens. `unbind`: the backward of w[e] would fill all of w each time."""
    w1_FD, w3_FD, w2_DF = (w.unbind(0) for w in weights)
    y_TD = torch.zeros_like(x_TD)
    for e in ids_TK.unique().tolist():
        token_n, choice_n = torch.where(ids_TK == e)
        x_nD = x_TD.index_select(0, token_n)
        h_nF = fn.silu(fn.linear(x_nD, w1_FD[e])) * fn.linear(x_nD, w3_FD[e])
        y_nD = fn.linear(h_nF, w2_DF[e]) * scores_TK[token_n, choice_n].unsqueeze(1)
        y_TD = y_TD.index_add(0, token_n, y_nD.to(y_TD.dtype))
    return y_TD
