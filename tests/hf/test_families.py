"""Every record beside transformers' own block: output and all gradients, tiny and random."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import spmd_moe.hf as hf
from spmd_moe import MoEMesh
from spmd_moe.hf.families import FAMILIES
from spmd_moe.hf.family import Family
from tests.hf.models import long_if
from tests.hf.tiny import DIM, WideRouters, tiny_block

BATCH, LENGTH = 2, 17


class Holder(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block
        self.config = SimpleNamespace(model_type="tiny")

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        out: Tensor = y[0] if isinstance(y, tuple) else y
        return out.view_as(x)


def run(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input, gradients of the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, DIM, generator=generator, dtype=torch.float64).to(dtype)
    x.requires_grad_()
    torch.manual_seed(2)  # of routers that draw
    y = model(x * 1)  # some change what they are given
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, grads


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def worst_error(family: Family, dtype: torch.dtype) -> dict[str, float]:
    """Of the output and of every gradient, relative to the largest number there."""
    torch.manual_seed(0)
    theirs = Holder(tiny_block(family)).to(dtype)
    ours = hf.swap(copy.deepcopy(theirs), MoEMesh.single())
    layout = hf.checkpoint_layout.layout_of(ours)
    assert layout is not None
    wide = dtype is torch.float64
    theirs_too = bool(family.after) or family.routed is not None  # modules that we keep
    with WideRouters() if wide and theirs_too else nullcontext():
        y, dx, grads = run(ours, dtype)
    with WideRouters() if wide else nullcontext():
        y_theirs, dx_theirs, grads_theirs = run(theirs, dtype)
    found = {"output": error(y, y_theirs), "input": error(dx, dx_theirs)}
    for tensor in layout.memory:
        if tensor.key not in grads_theirs:
            continue
        whole = grads[tensor.names[0]].shape
        fine = grads_theirs[tensor.key].view(tensor.fine_shape(whole))
        parts = [
            hf.element_map.Part(grads[n], tuple(whole), (0,) * len(whole)) for n in tensor.names
        ]
        box = tensor.box(parts[0])
        assert box is not None
        for region, values in tensor.regions(parts, box, fine):
            found[tensor.key] = max(found.get(tensor.key, 0.0), error(region, values))
    assert len(found) >= 4, "experts, router, input and output"
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_float64(name: str) -> None:
    found = worst_error(FAMILIES[name], torch.float64)
    assert max(found.values()) < 1e-12, found


def alone(family: Family) -> Family:
    """The record without its names: equal for blocks that are textually the same."""
    return replace(family, name="", block="")


FIRST = {alone(family): name for name, family in reversed(FAMILIES.items())}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=long_if(FIRST[alone(f)] != n)) for n, f in FAMILIES.items()],
)
def test_float32(name: str) -> None:
    found = worst_error(FAMILIES[name], torch.float32)
    assert max(found.values()) < 2e-6, found
