"""The families, as data: one record for each kind of MoE block in transformers 5.24.

`FAMILIES` are those that the layer expresses; `UNSUPPORTED` says of the others what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from spmd_moe.hf.family import (
    INTERLEAVED,
    STACKED_ROWS,
    TRANSPOSED,
    TRANSPOSED_BIASED,
    UNGATED,
    Family,
    Groups,
    Need,
    attribute,
    clamped_silu_glu,
    silu_glu_clamped_after,
)
from spmd_moe.layer.activations import Activation, clamped_swiglu

_JITTER = Need("jitter_noise", (0, 0.0, None), "jitter of the experts' input")
_BIAS = "gate.e_score_correction_bias"
_GROUPS = Groups("gate.num_group", "gate.topk_group", 2)

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
MIXTRAL = Family("mixtral", "MixtralSparseMoeBlock", "softmax", needs=(_JITTER,))
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
    needs=(Need("gate.norm_min", (1e-12,), "a bound of its own of the normalization's divisor"),),
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
        Need("moe_normalize_expert_weights", (None, 1, 1.0), "division by another norm than 1"),
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
    needs=(Need("config.zero_expert_num", (None, 0), "experts that return their input"),),
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
    needs=(Need("gate.topk_method", ("greedy", "group_limited_greedy"), "another way to choose"),),
)
MISTRAL4 = Family(
    "mistral4",
    "Mistral4MoE",
    "softmax",
    norm="gate.norm_topk_prob",
    scale=("gate.routed_scaling_factor",),
    groups=_GROUPS,
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

# --- sigmoid ------------------------------------------------------------------------------------

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3MoE",
    "sigmoid",
    norm="gate.norm_topk_prob",
    scale=("gate.routed_scaling_factor",),
    groups=_GROUPS,
    bias=_BIAS,
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
    needs=(_JITTER,),
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
    bias=_BIAS,
    shared="shared_experts",
    needs=(Need("gate.router_logit_softcapping", (0, 0.0), "a soft cap of the logits"),),
)
LFM2 = Family(
    "lfm2_moe",
    "Lfm2MoeSparseMoeBlock",
    "sigmoid",
    norm=False,
    scale=("gate.routed_scaling_factor",),
    bias="expert_bias",
    needs=(
        Need("gate.norm_topk_prob", (False,), "an epsilon of its own in the normalization"),
        Need("use_expert_bias", (True,), "a block without the bias"),
    ),
)


Reader = Callable[[nn.Module], Activation]


def _clamped(limit: str, clamp: Callable[[float], Activation] = clamped_silu_glu) -> Reader:
    """The activation with the limit that an attribute of the block says."""
    return lambda block: clamp(attribute(block, limit))


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
    bias=_BIAS,
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
    bias=_BIAS,
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
NEMOTRON = replace(
    DEEPSEEK_V3,
    name="nemotron_h",
    block="NemotronHMoE",
    layout=UNGATED,
    needs=(Need("config.moe_latent_size", (None,), "experts narrower than the router's input"),),
)


def _like(family: Family, **blocks: str) -> list[Family]:
    """Families whose block is textually the same."""
    return [replace(family, name=name, block=block) for name, block in blocks.items()]


RECORDS = [
    QWEN3,
    *_like(
        QWEN3,
        mellum="MellumSparseMoeBlock",
        olmoe="OlmoeSparseMoeBlock",
        flex_olmo="FlexOlmoSparseMoeBlock",
        qwen3_omni_moe="Qwen3OmniMoeThinkerTextSparseMoeBlock",
    ),
    replace(QWEN3, name="qwen3_vl_moe", block="Qwen3VLMoeTextSparseMoeBlock", norm=True),
    QWEN2,
    *_like(
        QWEN2,
        qwen3_next="Qwen3NextSparseMoeBlock",
        qwen4_exp="Qwen4ExpTextSparseMoeBlock",
        qwen3_omni_moe="Qwen3OmniMoeTalkerTextSparseMoeBlock",
    ),
    QWEN35,
    replace(QWEN2, name="lara_mini", block="LaraMiniSparseMoeBlock", shared_gate=None),
    MIXTRAL,
    *_like(MIXTRAL, minimax="MiniMaxSparseMoeBlock"),
    JAMBA,
    GRANITE,
    *_like(
        GRANITE,
        granitemoe_swa="GraniteMoeSWAMoE",
        granitemoehybrid="GraniteMoeHybridMoE",
        granitemoeshared="GraniteMoeSharedMoE",
    ),
    ERNIE,
    HUNYUAN,
    DBRX,
    LONGCAT,
    DEEPSEEK_V2,
    *_like(DEEPSEEK_V2, deepseek_ocr2="DeepseekOcr2TextMoe", unlimited_ocr="UnlimitedOcrTextMoe"),
    MISTRAL4,
    replace(MISTRAL4, name="mistral_large4", block="MistralLarge4TextMoE", norm=True),
    ARIA,
    COHERE,
    GPT_OSS,
    replace(
        GPT_OSS,
        name="openai_privacy_filter",
        block="OpenAIPrivacyFilterMLP",
        layout=TRANSPOSED_BIASED,  # divides by top_k and multiplies by it again
    ),
    DEEPSEEK_V3,
    *_like(
        DEEPSEEK_V3,
        deepseek_v32="DeepseekV32MoE",
        bailing_hybrid="BailingHybridMoE",
        dots1="Dots1MoE",
        dots3_note="Dots3NoteTextMoE",
        exaone_moe="ExaoneMoeSparseMoEBlock",
        glm4_moe="Glm4MoeMoE",
        glm4_moe_lite="Glm4MoeLiteMoE",
        glm4v_moe="Glm4vMoeTextMoE",
        glm_moe_dsa="GlmMoeDsaMoE",
        kimi_linear="KimiLinearMoE",
        solar_open="SolarOpenMoE",
    ),
    replace(DEEPSEEK_V3, name="mimo_v2_flash", block="MiMoV2FlashMoE", shared=None),
    replace(DEEPSEEK_V3, name="axk1", block="AXK1MoE", after=("post_mlp_layernorm",)),
    BEAM,
    AFMOE,
    HY_V3,
    replace(HY_V3, name="dots3_note", block="Dots3NoteVisionMoE", shared=None),
    MINIMAX_M2,
    FLINT,
    LAGUNA,
    LFM2,
    HY_V4,
    *_like(HY_V4, hy_v4_vl="HYV4VLMoE"),
    GLM5,
    DEEPSEEK_V4,
    STEP,
    MINIMAX_M3,
    NEMOTRON,
]
FAMILIES = {family.block: family for family in RECORDS}

# --- blocks of which the layer lacks something -------------------------------------------------

UNSUPPORTED = {
    "AXK2MoE": "groups that are left out by a score of 0, which can be the best there is",
    "DogeCDMoE": "experts that are single vectors, chosen by products of keys",
    "Ernie4_5_VLMoeMoeBlock": "two MoEs, one for each kind of token",
    "Inkling2LoopSparseMoeBlock": "a gated activation with soft caps",
    "Inkling2SparseMoeBlock": "a gated activation with soft caps",
    "InklingMoE": "shared experts weighted by the router of the routed ones",
    "JetMoeMoA": "experts of attention, in two separate halves",
    "JetMoeMoE": "a bias that is added to the output of all experts together",
    "Kolibri1SparseMoeBlock": "choosing by logits plus bias and weighing by their sigmoid",
    "Llama4TextMoe": "weights on the experts' input",
    "MuseSparkMoE": "experts narrower than the router's input",
    "NllbMoeSparseMLP": "a capacity for each expert, and a second expert by chance",
    "PhimoeSparseMoeBlock": "the masked softmaxes of sparsemixer",
    "SwitchTransformersSparseMLP": "a capacity for each expert in the order of the tokens",
    "Gemma4TextRouter": "a router with another input than the experts",
    "DiffusionGemmaTextRouter": "a router with another input than the experts",
    "VitPoseNaiveMoe": "experts that are chosen by the data set",
    "ZayaSparseMoeBlock": "a router with a state, and tokens that skip the experts",
}
