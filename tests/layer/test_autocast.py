"""Under autocast: the experts' matmuls follow it, the gate and the sums for losses do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as fn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from spmd_moe import (
    SWIGLU,
    Activation,
    DtypeError,
    ExpertRecompute,
    LoopedMatmul,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    SharedConfig,
    init_weights,
)
from spmd_moe.core.compute_dtype import matmul_dtype
from spmd_moe.layer.grouped_matmul import GroupedMatmul, Masked, TorchGroupedMM
from tests.bench.layer import grad_of

CONFIG = MoEConfig(6, 8, RouterConfig(8, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_tokens_of_the_layers_dtype(dtype: torch.dtype) -> None:
    mesh = MoEMesh.single()
    layer = MoE(CONFIG, mesh)
    init_weights(layer, mesh, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.to(dtype)(torch.ones(3, 6, dtype=dtype)).hidden.sum().backward()
    assert grad_of(layer.experts.w1_eFD).any()


@pytest.mark.parametrize("matmul", [LoopedMatmul(), Masked(), TorchGroupedMM()], ids=str)
@pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda keep: keep.value)
def test_autocast_takes_what_another_layer_made_of_it(
    keep: ExpertRecompute, matmul: GroupedMatmul
) -> None:
    """Tokens in bfloat16 for a layer in float32: as if they were cast back, and then rounded."""
    config = replace(
        CONFIG, dim=8, hidden_dim=16, recompute=keep, bias=True, shared=SharedConfig(8, True)
    )
    layer = MoE(config, mesh := MoEMesh.single(), matmul=matmul)
    init_weights(layer, mesh, seed=0, std=0.5)
    made = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for x in (made.clone(), made.float()):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = layer(x.requires_grad_()).hidden
        hidden.float().square().sum().backward()
        assert hidden.dtype is x.dtype and grad_of(x).dtype is x.dtype
        found.append([hidden.detach(), grad_of(x), *(grad_of(p) for p in layer.parameters())])
    for short, long in zip(*found, strict=True):
        assert long.any() and short.isfinite().all()
        near = 0.05 * float(long.abs().max())
        torch.testing.assert_close(short.float(), long.float(), rtol=0.05, atol=near)
    with pytest.raises(DtypeError, match=r"x is bf16\[9, 8\], the layer f32"):
        layer(made)


def results(
    keep: ExpertRecompute,
    matmul: GroupedMatmul | None,
    dtype: torch.dtype | None,
    activation: Activation = SWIGLU,
) -> list[Tensor]:
    """Outputs and gradients of a float32 layer; backward runs when autocast, if any, has ended."""
    mesh, x = MoEMesh.single(), torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    config = MoEConfig(8, 16, RouterConfig(8, 2), activation=activation, recompute=keep)
    layer = MoE(config, mesh, matmul=matmul)
    init_weights(layer, mesh, seed=0)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        hidden = layer(x).hidden
    hidden.square().sum().backward()
    return [hidden.detach(), *(grad_of(p) for p in layer.experts.parameters())]


@pytest.mark.parametrize(
    "matmul", [LoopedMatmul(), LoopedMatmul(row_block=4), Masked(), TorchGroupedMM()], ids=str
)
def test_the_matmuls_of_experts_follow_autocast(matmul: GroupedMatmul) -> None:
    """Forward and backward, also where backward computes the first matmuls again."""
    found = [results(keep, matmul, torch.bfloat16) for keep in ExpertRecompute]
    plain = results(ExpertRecompute.FIRST_MATMULS, matmul, None)
    for kept, again, other in zip(*found, plain, strict=True):
        assert kept.dtype is torch.float32 and kept.any()
        assert torch.equal(kept, again) and not torch.equal(kept, other)
        torch.testing.assert_close(kept, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


def test_it_is_what_the_matmul_can_be_told() -> None:
    asked = results(ExpertRecompute.NONE, LoopedMatmul(), torch.bfloat16)
    told = results(ExpertRecompute.NONE, LoopedMatmul(torch.bfloat16), None)
    assert all(torch.equal(a, b) for a, b in zip(asked, told, strict=True))
    for rows in (1, 4):  # padded rows, too
        wide = results(ExpertRecompute.NONE, LoopedMatmul(torch.float32, rows), torch.bfloat16)
        plain = results(ExpertRecompute.NONE, LoopedMatmul(row_block=rows), None)
        assert all(torch.equal(a, b) for a, b in zip(wide, plain, strict=True))


def test_the_matmul_is_chosen_for_the_dtype_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a layer in that dtype: a kernel for all experts, or float32, where that is quicker."""
    told = results(ExpertRecompute.NONE, TorchGroupedMM(), torch.bfloat16)
    chosen = {torch.bfloat16: TorchGroupedMM(), torch.float32: LoopedMatmul()}
    monkeypatch.setattr(
        "spmd_moe.layer.experts.choose_matmul", lambda dtype, *_, **__: chosen[dtype]
    )
    asked = results(ExpertRecompute.NONE, None, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(asked, told, strict=True))
    plain = results(ExpertRecompute.NONE, LoopedMatmul(), None)
    without = results(ExpertRecompute.NONE, None, None)
    assert all(torch.equal(a, b) for a, b in zip(without, plain, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(asked, plain, strict=True))


def test_each_device_has_an_autocast_of_its_own() -> None:
    mode = FakeTensorMode()
    on_cpu, on_cuda = (FakeTensor(mode, torch.ones(2, device="meta"), d) for d in ("cpu", "cuda:0"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul_dtype(on_cpu) is torch.bfloat16 and matmul_dtype(on_cuda) is torch.float32


def test_autocast_stays_out_of_activations() -> None:
    """Some operators it takes to float32, which then would meet weights in bfloat16."""

    def forward(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
        return fn.pad(gate_RF.sigmoid().unsqueeze(0), (0, 0), mode="replicate").squeeze(0)

    widened = Activation("widened by autocast", False, forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward(torch.ones(2, 3, dtype=torch.bfloat16), None).dtype is torch.float32
    for matmul in (LoopedMatmul(), Masked()):
        cast = results(ExpertRecompute.FIRST_MATMULS, matmul, torch.bfloat16, widened)
        plain = results(ExpertRecompute.FIRST_MATMULS, matmul, None, widened)
        for found, near in zip(cast, plain, strict=True):
            assert found.any() and not torch.equal(found, near)
            torch.testing.assert_close(found, near, rtol=0.05, atol=0.05 * float(near.abs().max()))


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
