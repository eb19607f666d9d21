"""Records of the families whose scores are elementwise: sigmoid, square root of softplus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from spmd_moe.hf.families_softmax import BIAS, GROUPS, JITTER
from spmd_moe.hf.family import TRANSPOSED, UNGATED, Family, Need, attribute
from spmd_moe.hf.family_activations import (
    clamped_silu_glu,
    other_than_silu,
    silu_glu_clamped_after,
    softcapped_glu,
)
from spmd_moe.layer.activations import Activation, clamped_swiglu
from spmd_moe.layer.moe_config import ScoreApplication

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3MoE",
    "sigmoid",
    norm="gate.norm_topk_prob",
    scale=("gate.routed_scaling_factor",),
    groups=GROUPS,
    bias=BIAS,
    shared="shared_experts",
)
BEAM = replace(
    DEEPSEEK_V3, name="beam", block="BeamMoE", scale=("routed_scaling_factor",), shared=None
)
AFMOE = Family(
    "afmoe",
    "AfmoeSparseMoeBlock",
    "sigmoid",
    scale=("router.route_scale",),
    top_k="router.top_k",
    gate="router",
    weight="router.gate.weight",
    bias="expert_bias",
    shared="shared_experts",
)
HY_V3 = Family(
    "hy_v3",
    "HYV3MoE",
    "sigmoid",
    scale=("gate.router_scaling_factor",),
    bias="e_score_correction_bias",
    shared="shared_experts",
)
MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2SparseMoeBlock",
    "sigmoid",
    bias="e_score_correction_bias",
    needs=(JITTER,),
)
FLINT = Family(
    "flint",
    "FlintSparseMoeBlock",
    "sigmoid",
    norm="gate.norm_topk_prob",
    shared="shared_expert",
)
LAGUNA = Family(
    "laguna",
    "LagunaSparseMoeBlock",
    "sigmoid",
    scale=("routed_scaling_factor",),
    bias=BIAS,
    shared="shared_experts",
    softcap="gate.router_logit_softcapping",
)
LFM2 = Family(
    "lfm2_moe",
    "Lfm2MoeSparseMoeBlock",
    "sigmoid",
    norm="gate.norm_topk_prob",
    norm_eps=1e-6,
    scale=("gate.routed_scaling_factor",),
    bias="expert_bias",
    needs=(Need("use_expert_bias", (True,), "a block without the bias"),),
)


AXK2 = replace(DEEPSEEK_V3, name="axk2", block="AXK2MoE", excluded_score=0.0)
KOLIBRI = Family(
    "kolibri1",
    "Kolibri1SparseMoeBlock",
    "sigmoid",
    norm="gate.norm_topk_prob",
    bias=BIAS,
    choose_by="logits",
    shared="shared_experts",
)
LLAMA4 = Family(
    "llama4",
    "Llama4TextMoe",
    "sigmoid",
    norm=False,
    gate="router",
    weight="router.weight",
    top_k="top_k",
    choose_by="logits",
    application=ScoreApplication.ON_INPUT,
    layout=TRANSPOSED,
    shared="shared_expert",
    returns="pair",
)


Reader = Callable[[nn.Module], Activation | str]


def _clamped(limit: str, clamp: Callable[[float], Activation] = clamped_silu_glu) -> Reader:
    """The activation with the limit in an attribute of the block, if it clamps silu."""
    owner = limit.rpartition(".")[0]

    def activation(block: nn.Module) -> Activation | str:
        return other_than_silu(attribute(block, owner)) or clamp(attribute(block, limit))

    return activation


def _m3(owner: str) -> Reader:
    def activation(block: nn.Module) -> Activation:
        where = attribute(block, owner)
        return clamped_swiglu(where.swiglu_limit, where.swiglu_alpha)

    return activation


HY_V4 = replace(
    DEEPSEEK_V3, name="hy_v4", block="HYV4MoE", activation=_clamped("experts.swiglu_limit")
)
GLM5 = replace(
    HY_V4,
    name="glm5_next",
    block="Glm5NextTextMoE",
    shared_activation=_clamped("shared_experts.swiglu_limit"),
)
DEEPSEEK_V4 = Family(
    "deepseek_v4",
    "DeepseekV4SparseMoeBlock",
    "gate.score_fn",
    scale=("gate.routed_scaling_factor",),
    bias=BIAS,
    activation=_clamped("experts.limit"),
    shared="shared_experts",
    shared_activation=_clamped("shared_experts.limit"),
    needs=(Need("is_hash", (False,), "experts by a table of token ids"),),
)
STEP = Family(
    "step3p7",
    "Step3p7SparseMoeBlock",
    "sigmoid",
    scale=("routed_scaling_factor",),
    bias=BIAS,
    activation=_clamped("experts.limit", silu_glu_clamped_after),
    shared="shared_experts",
    shared_activation=_clamped("shared_experts.limit", silu_glu_clamped_after),
)
MINIMAX_M3 = replace(
    STEP,
    name="minimax_m3_vl",
    block="MiniMaxM3VLSparseMoeBlock",
    activation=_m3("experts"),
    shared_activation=_m3("shared_experts"),
)
INKLING2 = Family(
    "inkling2",
    "Inkling2SparseMoeBlock",
    "gate.score_fn",
    scale=("gate.routed_scaling_factor",),
    bias=BIAS,
    activation=lambda block: softcapped_glu(
        attribute(block, "experts.act_fn.gate_softcap.softcap"),
        attribute(block, "experts.act_fn.up_softcap.softcap"),
    ),
)
NEMOTRON = replace(
    DEEPSEEK_V3,
    name="nemotron_h",
    block="NemotronHMoE",
    layout=UNGATED,
    latent=("fc1_latent_proj", "fc2_latent_proj"),
)
