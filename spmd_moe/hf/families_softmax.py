"""Records of the families whose router is a softmax, and definitions that all records share."""

from __future__ import annotations

from dataclasses import replace

from spmd_moe.hf.family import (
    INTERLEAVED,
    STACKED_ROWS,
    TRANSPOSED,
    Family,
    Groups,
    Need,
    attribute,
)
from spmd_moe.layer.activations import clamped_swiglu

JITTER = Need("jitter_noise", (0, 0.0, None), "jitter of the experts' input")
BIAS = "gate.e_score_correction_bias"
GROUPS = Groups("gate.num_group", "gate.topk_group", 2)

# --- softmax over all experts -------------------------------------------------------------------

QWEN3 = Family("qwen3_moe", "Qwen3MoeSparseMoeBlock", "softmax", norm="gate.norm_topk_prob")
QWEN2 = replace(
    QWEN3,
    name="qwen2_moe",
    block="Qwen2MoeSparseMoeBlock",
    shared="shared_expert",
    shared_gate="shared_expert_gate",
)
QWEN35 = replace(QWEN2, name="qwen3_5_moe", block="Qwen3_5MoeSparseMoeBlock", norm=True)
MIXTRAL = Family("mixtral", "MixtralSparseMoeBlock", "softmax", needs=(JITTER,))
JAMBA = Family(
    "jamba",
    "JambaSparseMoeBlock",
    "softmax",
    norm=False,
    gate="router",
    weight="router.weight",
    top_k="router.top_k",
)
GRANITE = replace(JAMBA, name="granitemoe", block="GraniteMoeMoE", score="softmax_chosen")
ERNIE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeSparseMoeBlock",
    "softmax",
    bias="gate.moe_statics.e_score_correction_bias",
    shared="shared_experts",
    needs=(Need("gate.norm_min", (1e-12,), "a lower bound of the normalization's divisor"),),
)
HUNYUAN = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1Moe",
    "softmax",
    weight="gate.wg.weight",
    shared="shared_mlp",
)
DBRX = Family(
    "dbrx",
    "DbrxFFN",
    "softmax",
    norm="moe_normalize_expert_weights",
    top_k="top_k",
    gate="router",
    weight="router.layer.weight",
    layout=STACKED_ROWS,
    needs=(
        Need(
            "moe_normalize_expert_weights",
            (None, 1, 1.0),
            "division by a norm other than the 1-norm",
        ),
        Need("router.moe_jitter_eps", (None, 0, 0.0), "jitter of the experts' input"),
    ),
)
LONGCAT = Family(
    "longcat_flash",
    "LongcatFlashMoE",
    "softmax",
    norm=False,
    scale=("router.routed_scaling_factor",),
    top_k="router.top_k",
    gate="router",
    weight="router.classifier.weight",
    bias="router.e_score_correction_bias",
    needs=(
        Need(
            "config.zero_expert_num",
            (None, 0),
            "rows of gate_up_proj that belong to experts without weights, and that nothing reads",
        ),
    ),
)
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2Moe",
    "softmax",
    norm=False,
    scale=("gate.routed_scaling_factor",),
    groups=Groups(
        "gate.num_group", "gate.topk_group", 1, when=("gate.topk_method", "group_limited_greedy")
    ),
    shared="shared_experts",
    needs=(
        Need("gate.topk_method", ("greedy", "group_limited_greedy"), "a different way to choose"),
    ),
)
MISTRAL4 = Family(
    "mistral4",
    "Mistral4MoE",
    "softmax",
    norm="gate.norm_topk_prob",
    scale=("gate.routed_scaling_factor",),
    groups=GROUPS,
    shared="shared_experts",
)

# --- softmax over the chosen experts ------------------------------------------------------------

ARIA = Family(
    "aria",
    "AriaTextMoELayer",
    "softmax_chosen",
    norm=False,
    gate="router",
    weight="router.weight",
    top_k="router.top_k",
    layout=TRANSPOSED,
    shared="shared_experts",
)
COHERE = Family(
    "cohere2_moe",
    "Cohere2MoeSparseMoeBlock",
    "gate.expert_selection_fn",
    norm="gate.norm_topk_prob",
    choose_by="logits",
    shared="shared_experts",
    needs=(
        Need("shared_expert_combination_strategy", ("sum",), "a mean of routed and shared output"),
    ),
)
GPT_OSS = Family(
    "gpt_oss",
    "GptOssMLP",
    "softmax_chosen",
    norm=False,
    gate="router",
    weight="router.weight",
    weight_bias="router.bias",
    top_k="router.top_k",
    layout=INTERLEAVED,
    activation=lambda block: clamped_swiglu(
        attribute(block, "experts.limit"), attribute(block, "experts.alpha")
    ),
    returns="pair",
)
