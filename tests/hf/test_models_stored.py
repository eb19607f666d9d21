"""Whole tiny models stored by FSDP2, recomputed in backward: real processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import spmd_moe.hf as hf
from spmd_moe import DP, MoEMesh, parallelize
from tests.hf.models import (
    LAYOUTS,
    MODELS,
    SEQUENCES,
    TARGETS,
    gradient_error,
    mine,
    model_of,
    theirs,
    tokens,
)
from tests.support.workers import run

GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}


def on_a_rank(name: str, degrees: dict[str, int]) -> dict[str, float]:
    """Largest errors of logits and gradients, this rank's part of the loss, tokens that differ."""
    mesh = MoEMesh.init("cpu", **degrees)
    whole = model_of(name)
    model = hf.swap(copy.deepcopy(whole), mesh)
    model.activation_checkpointing_enable()
    parallelize(model, mesh, blocks=model.model.layers)
    out = model(mine(mesh), labels=mine(mesh), num_items_in_batch=TARGETS, use_cache=False)
    out.loss.backward()
    logits, _, grads = theirs(name)
    each = SEQUENCES // mesh[DP].size
    own = slice(mesh[DP].rank * each, (mesh[DP].rank + 1) * each)
    gradients = gradient_error(model, mesh, grads)
    generated = model.eval().generate(mine(mesh), synced_gpus=mesh[DP].size > 1, **GENERATE)
    expected = whole.eval().generate(tokens(), **GENERATE)[own]
    return {
        "logits": float((out.logits.detach() - logits[own]).abs().max()),
        "gradients": gradients,
        "loss": float(out.loss.detach()) / (mesh.dense.size() // mesh[DP].size),
        "tokens": float((generated != expected).sum()),
    }


@pytest.mark.gloo
@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_stored_by_fsdp(name: str, degrees: dict[str, int]) -> None:
    found = run(4, on_a_rank, name, degrees, timeout=240.0)
    assert max(rank["logits"] for rank in found) < 2e-5
    assert max(rank["gradients"] for rank in found) < 1e-5
    assert sum(rank["loss"] for rank in found) == pytest.approx(float(theirs(name)[1]), abs=2e-6)
    assert [rank["tokens"] for rank in found] == [0.0] * 4
