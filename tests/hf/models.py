"""Tiny whole models of transformers, and their gradients beside those of swapped ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spmd_moe import DP, MoEMesh, obligations
from spmd_moe.hf.checkpoint_layout import layout_of
from spmd_moe.hf.element_map import Part
from spmd_moe.train.storage_mesh import local, place_in_whole

LAYOUTS = [
    {"dp": 4, "ep": 4},
    {"dp": 2, "tp": 2, "ep": 4},
    {"tp": 4, "ep": 2, "etp": 2},
]
SEQUENCES, LENGTH, VOCABULARY = 4, 6, 40
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "swiglu_limit": 0.7},
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def long_if(repeat: bool) -> list[pytest.MarkDecorator]:
    """Mark a case that repeats what others show."""
    return [pytest.mark.long] if repeat else []


def config_of(name: str, **more: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**SMALL, **MODELS[name], **more})


def model_of(name: str, **more: Any) -> Any:
    """The model with random weights, the same on every call."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **more)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or parameter.abs().max() == 0:
                parameter.normal_(std=0.3)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def empty_model_of(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name)).train()


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


TARGETS = SEQUENCES * (LENGTH - 1)


@cache
def theirs(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of transformers' own model, on one process."""
    model = model_of(name)
    out = model(tokens(), labels=tokens(), num_items_in_batch=TARGETS)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), out.loss.detach(), grads


def mine(mesh: MoEMesh) -> Tensor:
    """The sequences of this rank of dp."""
    each = SEQUENCES // mesh[DP].size
    return tokens()[mesh[DP].rank * each :][:each]


def parts_beside(
    model: nn.Module, mesh: MoEMesh, whole: Mapping[str, Tensor], of: Callable[[Tensor], Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each region of what this rank holds of a tensor of `whole`: its name, ours, and theirs.

    `of` is what is compared of a parameter: itself, or its gradient.
    """
    layout = layout_of(model)
    assert layout is not None
    parts = {}
    for row in obligations(model, mesh):
        if row.is_buffer:
            continue
        parameter = model.get_parameter(row.name)
        assert of(parameter) is not None, row.name
        at = place_in_whole(row.placement, mesh, parameter)
        parts[row.name] = Part(local(of(parameter)), row.global_shape, at)
    compared = set()
    for tensor in layout.memory:
        if tensor.key not in whole or tensor.names[0] not in parts:
            continue
        own = [parts[name] for name in tensor.names]
        compared |= set(tensor.names)
        box = tensor.box(own[0])
        if box is None:
            continue
        fine = whole[tensor.key].view(tensor.fine_shape(own[0].whole))
        for dim, (start, size) in enumerate(box):
            fine = fine.narrow(dim, start, size)
        for region, values in tensor.regions(own, box, fine):
            yield tensor.key, region, values
    assert compared == parts.keys()


def gradient_error(model: nn.Module, mesh: MoEMesh, grads: Mapping[str, Tensor]) -> float:
    """The worst of this rank's gradients, relative to the largest number of transformers'.

    That is the largest of the tensor, of which a rank may have two numbers.
    """
    found = parts_beside(model, mesh, grads, lambda parameter: parameter.grad)
    return max(
        float((region - values).abs().max() / grads[key].abs().max())
        for key, region, values in found
    )
