"""The families, as data: one record for each kind of MoE block in transformers 5.24.

`FAMILIES` are those that the layer expresses; `UNSUPPORTED` says of the others what is missing.
"""

from __future__ import annotations

from dataclasses import replace

from spmd_moe.hf.families_sigmoid import (
    AFMOE,
    AXK2,
    BEAM,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    FLINT,
    GLM5,
    HY_V3,
    HY_V4,
    INKLING2,
    KOLIBRI,
    LAGUNA,
    LFM2,
    LLAMA4,
    MINIMAX_M2,
    MINIMAX_M3,
    NEMOTRON,
    STEP,
)
from spmd_moe.hf.families_softmax import (
    ARIA,
    COHERE,
    DBRX,
    DEEPSEEK_V2,
    ERNIE,
    GPT_OSS,
    GRANITE,
    HUNYUAN,
    JAMBA,
    LONGCAT,
    MISTRAL4,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN35,
)
from spmd_moe.hf.family import EXPERTS, TRANSPOSED_BIASED, Family

# --- experts behind a router of transformers ----------------------------------------------------

GEMMA4 = Family(
    "gemma4",
    "Gemma4TextExperts",
    "given",
    weight="gate_up_proj",
    layout=EXPERTS,
    routed="router.config.top_k_experts",
)
PHIMOE = replace(GEMMA4, name="phimoe", block="PhimoeExperts", routed="top_k")
ZAYA = replace(GEMMA4, name="zaya", block="ZayaExperts", routed="gate.top_k")


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
    AXK2,
    KOLIBRI,
    LLAMA4,
    INKLING2,
    *_like(INKLING2, inkling2_loop="Inkling2LoopSparseMoeBlock"),
    GEMMA4,
    *_like(GEMMA4, diffusion_gemma="DiffusionGemmaTextExperts"),
    PHIMOE,
    ZAYA,
    *_like(ZAYA, inkling="InklingExperts"),
]
FAMILIES = {family.block: family for family in RECORDS}

# --- blocks of which the layer lacks something -------------------------------------------------

UNSUPPORTED = {
    "DogeCDMoE": "experts that are single vectors, chosen by products of keys",
    "Ernie4_5_VLMoeMoeBlock": "two MoEs, one for each kind of token",
    "JetMoeMoA": "experts of attention, in two separate halves",
    "JetMoeMoE": "a bias that is added to the output of all experts together",
    "MuseSparkMoE": "a norm of the output of each expert before it is weighed",
    "NllbMoeSparseMLP": "a capacity for each expert, and a second expert by chance",
    "SwitchTransformersSparseMLP": "a capacity for each expert in the order of the tokens",
    "VitPoseNaiveMoe": "experts that are chosen by the data set",
}
