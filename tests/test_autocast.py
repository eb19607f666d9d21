"""Under autocast: the experts' matmuls follow it, the gate and the sums for losses do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from spmd_moe import Keep, MoE, MoEConfig, MoEMesh, PerExpert, RouterConfig, init_weights

CONFIG = MoEConfig(6, 8, RouterConfig(8, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_tokens_of_the_layers_dtype(dtype: torch.dtype) -> None:
    mesh = MoEMesh.single()
    layer = MoE(CONFIG, mesh)
    init_weights(layer, mesh, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.to(dtype)(torch.ones(3, 6, dtype=dtype)).hidden.sum().backward()
    assert layer.experts.w1_eFD.grad is not None


@pytest.mark.parametrize("keep", Keep)
def test_the_matmuls_of_experts_follow_autocast(keep: Keep) -> None:
    """Forward and backward, also where backward computes them again, after autocast has ended."""
    mesh, x = MoEMesh.single(), torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    layer = MoE(replace(CONFIG, keep=keep), mesh)
    init_weights(layer, mesh, seed=0)

    def results(dtype: torch.dtype | None, matmul: PerExpert) -> list[Tensor]:
        layer.experts.matmul = matmul
        layer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            hidden = layer(x).hidden
        hidden.square().sum().backward()
        grads = [p.grad for p in layer.experts.parameters()]
        return [hidden.detach(), *(grad.clone() for grad in grads if grad is not None)]

    cast = results(torch.bfloat16, PerExpert())
    assert len(cast) == 4 and all(t.dtype is torch.float32 and t.any() for t in cast)
    for as_cast, as_asked, plain in zip(
        cast, results(None, PerExpert(torch.bfloat16)), results(None, PerExpert()), strict=True
    ):
        assert torch.equal(as_cast, as_asked) and not torch.equal(as_cast, plain)
        torch.testing.assert_close(as_cast, plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))


@pytest.mark.parametrize("balance", ["batch", "sequence"])
def test_autocast_stays_out_of_choices_and_loss_terms(
    balance: Literal["batch", "sequence"],
) -> None:
    mesh = MoEMesh.single()
    layer = MoE(replace(CONFIG, balance=balance), mesh)
    init_weights(layer, mesh, seed=0)
    x = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(0))
    alone = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        beside = layer(x)
    assert torch.equal(alone.counts_E, beside.counts_E) and alone.counts_E.min() > 0
    for name in ("z_sum", "prob_sums_BE", "tokens_B"):
        want, got = getattr(alone.losses, name), getattr(beside.losses, name)
        assert torch.equal(want, got) and want.dtype is got.dtype and want.min() > 0
