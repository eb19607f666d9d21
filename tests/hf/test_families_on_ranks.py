"""Blocks of transformers on ranks: one for each of the rarer choices of the layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import spmd_moe.hf as hf
from spmd_moe import DP, MoEMesh, reduce_gradients
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.hf.families import FAMILIES
from tests.hf import tiny
from tests.hf.models import gradient_error
from tests.hf.test_families import Holder, error
from tests.hf.tiny import DIM, WideRouters, tiny_block

BATCH, LENGTH = 4, 5
# One layout for each rare option of the layer: weights on the input, soft caps, epsilons, two
# scores, and ids and weights from transformers' router.
LAYOUTS = [{"dp": 4, "ep": 4}, {"dp": 2, "tp": 2, "ep": 4}, {"tp": 4, "ep": 2, "etp": 2}]
BLOCKS = [
    "AXK2MoE",
    "Kolibri1SparseMoeBlock",
    "Llama4TextMoe",
    "Inkling2SparseMoeBlock",
    "LagunaSparseMoeBlock",
    "Lfm2MoeSparseMoeBlock",
    "Gemma4TextExperts",
    "PhimoeExperts",
    "ZayaExperts",
    "InklingExperts",
    "NemotronHMoE",  # with latent experts
]


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LENGTH, DIM, generator=generator, dtype=torch.float64)


def on_a_rank(
    whole: nn.Module, degrees: dict[str, int], y: Tensor, dx: Tensor, grads: dict[str, Tensor]
) -> tuple[float, float, float]:
    """Errors of the output, of the gradient of the input, and of those of the parameters."""
    mesh = MoEMesh.init("cpu", **degrees)
    model = hf.swap(copy.deepcopy(whole), mesh)
    each = BATCH // mesh[DP].size
    own = slice(mesh[DP].rank * each, (mesh[DP].rank + 1) * each)
    x = tokens(0)[own].requires_grad_()
    with WideRouters():
        out = model(x * 1)
        (out * tokens(1)[own]).sum().backward()
    reduce_gradients(model, mesh)
    assert x.grad is not None
    off = error(out.detach(), y[own]), error(x.grad, dx[own])
    return *off, gradient_error(model, mesh, grads)


@pytest.mark.parametrize(("number", "name"), list(enumerate(BLOCKS)), ids=BLOCKS)
def test_ranks(number: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny._OF_FAMILY, "NemotronHMoE", tiny.LATENT)
    torch.manual_seed(0)
    whole = Holder(tiny_block(FAMILIES[name])).double().eval()  # PhiMoE draws in training
    x = tokens(0).requires_grad_()
    with WideRouters():
        y = whole(x * 1)
        (y * tokens(1)).sum().backward()
    grads = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    whole.zero_grad()
    assert x.grad is not None
    degrees = LAYOUTS[number % len(LAYOUTS)]
    found = threaded(4, on_a_rank, whole, degrees, y.detach(), x.grad, grads)
    assert max(max(errors) for errors in found) < 1e-12, found
