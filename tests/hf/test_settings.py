"""Settings of transformers' configs that are not the default: expressed, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import spmd_moe.hf as hf
from spmd_moe import ConfigError, MoEMesh
from spmd_moe.hf.families import FAMILIES
from tests.hf import tiny
from tests.hf.models import model_of, tokens
from tests.hf.test_families import Holder, error, run, worst_error


def holder(block: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Holder:
    """A model of one block, made from a config with these settings."""
    monkeypatch.setitem(tiny._OF_FAMILY, block, {**tiny._OF_FAMILY.get(block, {}), **settings})
    torch.manual_seed(0)
    return Holder(tiny.tiny_block(FAMILIES[block]))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_of_cohere(score: str, normalized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"expert_selection_fn": score, "norm_topk_prob": normalized}
    theirs = holder("Cohere2MoeSparseMoeBlock", monkeypatch, **settings)
    ours = hf.swap(copy.deepcopy(theirs), MoEMesh.single())
    y, dx, _ = run(ours, torch.float32)
    y_theirs, dx_theirs, _ = run(theirs, torch.float32)
    assert max(error(y, y_theirs), error(dx, dx_theirs)) < 2e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_latent_experts_of_nemotron(
    dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts narrower than the router's input, between two projections."""
    monkeypatch.setitem(tiny._OF_FAMILY, "NemotronHMoE", tiny.LATENT)
    found = worst_error(FAMILIES["NemotronHMoE"], dtype)
    assert {"mlp.gate.weight", "mlp.experts.up_proj", "mlp.fc2_latent_proj.weight"} < found.keys()
    assert max(found.values()) < bound, found


def test_zero_experts_of_longcat_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = holder("LongcatFlashMoE", monkeypatch, zero_expert_num=2)
    gate_up, down = (theirs.get_parameter(f"mlp.experts.{n}_proj") for n in ("gate_up", "down"))
    assert gate_up.shape[0] == 2 + down.shape[0]  # two that no forward reads
    with pytest.raises(ConfigError, match=r"zero_expert_num is 2: rows of gate_up_proj"):
        hf.swap(theirs, MoEMesh.single())


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(
    "block", ["DeepseekV4SparseMoeBlock", "Step3p7SparseMoeBlock", "Glm5NextTextMoE"]
)
def test_clamped_activations_other_than_silu_are_refused(
    block: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = holder(block, monkeypatch, hidden_act=activation)
    with pytest.raises(ConfigError, match=r"activation (GELUActivation|ReLU), clamped"):
        hf.swap(theirs, MoEMesh.single())


def test_a_model_that_has_recorded_router_logits_before() -> None:
    model = model_of("qwen3_moe")
    expected = model(tokens(), output_router_logits=True).router_logits
    found = hf.swap(model, MoEMesh.single())(tokens(), output_router_logits=True).router_logits
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_hooks_on_replaced_modules_are_refused() -> None:
    def hook(module: nn.Module, args: Any) -> None:
        """Nothing."""

    model: Any = model_of("mixtral")
    handle = model.model.layers[1].mlp.gate.register_forward_pre_hook(hook)
    with pytest.raises(ConfigError, match=r"'model\.layers\.1\.mlp\.gate' has a hook"):
        hf.swap(model, MoEMesh.single())
    handle.remove()
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * forward(x)
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.mlp' has its own forward"):
        hf.swap(model, MoEMesh.single())


def test_a_compiled_model_is_refused() -> None:
    compiled: Any = torch.compile(model_of("mixtral"), backend="eager")
    with pytest.raises(ConfigError, match=r"OptimizedModule is compiled"):
        hf.swap(compiled, MoEMesh.single())
