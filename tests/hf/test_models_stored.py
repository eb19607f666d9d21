"""Whole tiny models stored by FSDP2, recomputed in backward: real processes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import spmd_moe.hf as hf
from spmd_moe import DP, MoEMesh, parallelize
from tests.hf.models import (
    LAYOUTS,
    MODELS,
    SEQUENCES,
    TARGETS,
    gradient_error,
    long_if,
    mine,
    model_of,
    theirs,
    tokens,
)
from tests.support.workers import run

GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}


# Each model on one layout, and each layout; without FSDP2 test_models.py has all.
CHOSEN = {"qwen3_moe": [0], "mixtral": [1], "olmoe": [2], "gpt_oss": [1], "deepseek_v3": [2]}
CASES = [
    pytest.param(name, degrees, marks=long_if(number not in CHOSEN[name]))
    for name in MODELS
    for number, degrees in enumerate(LAYOUTS)
]


def on_a_rank(
    name: str,
    degrees: dict[str, int],
    logits: Tensor,
    grads: dict[str, Tensor],
    expected: Tensor,
) -> dict[str, float]:
    """Largest errors of logits and gradients, this rank's part of the loss, tokens that differ."""
    mesh = MoEMesh.init("cpu", **degrees)
    model = hf.swap(model_of(name), mesh)
    model.activation_checkpointing_enable()
    parallelize(model, mesh, blocks=model.model.layers)
    out = model(mine(mesh), labels=mine(mesh), num_items_in_batch=TARGETS, use_cache=False)
    out.loss.backward()
    each = SEQUENCES // mesh[DP].size
    own = slice(mesh[DP].rank * each, (mesh[DP].rank + 1) * each)
    gradients = gradient_error(model, mesh, grads)
    generated = model.eval().generate(mine(mesh), synced_gpus=mesh[DP].size > 1, **GENERATE)
    return {
        "logits": float((out.logits.detach() - logits[own]).abs().max()),
        "gradients": gradients,
        "loss": float(out.loss.detach()) / (mesh.dense.size() // mesh[DP].size),
        "tokens": float((generated != expected[own]).sum()),
    }


@pytest.mark.gloo
@pytest.mark.parametrize(("name", "degrees"), CASES, ids=str)
def test_stored_by_fsdp(name: str, degrees: dict[str, int]) -> None:
    logits, loss, grads = theirs(name)
    expected = model_of(name).eval().generate(tokens(), **GENERATE)
    found = run(4, on_a_rank, name, degrees, logits, grads, expected, timeout=240.0)
    assert max(rank["logits"] for rank in found) < 2e-5
    assert max(rank["gradients"] for rank in found) < 1e-5
    assert sum(rank["loss"] for rank in found) == pytest.approx(float(loss), abs=2e-6)
    assert [rank["tokens"] for rank in found] == [0.0] * 4
