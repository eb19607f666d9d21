"""How the routers of ranks differ: in their noise, and in their first round-robin expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spmd_moe import MoE, MoEConfig, MoEMesh, init_weights
from spmd_moe.layer.router import Router
from spmd_moe.layer.router_config import RouterConfig
from tests.layer.test_router import TOKENS, WIDTH, draw, in_float64, router_of
from tests.support.simulated_ranks import fake_world


def noise_on(rank: int) -> Tensor:
    """What ones become on a rank of eight."""
    with fake_world(8, rank):
        mesh = MoEMesh.init("cpu", dp=2, cp=2, tp=2, ep=4)
        router = Router(RouterConfig(4, 2, jitter=0.25), WIDTH, mesh)
        torch.manual_seed(3)
        return router.jitter(torch.ones(5, WIDTH))


def test_every_rank_has_noise_of_its_own_and_the_same_again() -> None:
    noise = [noise_on(rank) for rank in range(8)]
    assert torch.equal(noise[5], noise_on(5))
    values = torch.stack(noise)
    assert values.min() >= 0.75 and values.max() <= 1.25
    assert values.unique().numel() == values.numel()  # neither within a rank nor between two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_below_float32_is_as_fine(dtype: torch.dtype) -> None:
    """Of bfloat16 there is no number between 1 and 1.0078."""
    router = Router(RouterConfig(4, 2, jitter=0.002), WIDTH, MoEMesh.single())
    noisy = router.jitter(torch.ones(100, WIDTH, dtype=dtype))
    assert noisy.unique().numel() > 250 and abs(noisy.mean().item() - 1) < 3e-4
    assert 0.998 <= noisy.min() < 0.9981 and 1.0019 < noisy.max() <= 1.002


def test_the_experts_see_no_noise() -> None:
    mesh = MoEMesh.single()
    layer = MoE(MoEConfig(WIDTH, 8, RouterConfig(2, 2, score_func="softmax", jitter=0.9)), mesh)
    init_weights(layer, mesh, seed=0, std=1.0)
    x_TD, ids = torch.randn(5, WIDTH), torch.tensor([[0, -1]] * 5)
    with torch.no_grad():
        layer.router.weight_ED[1] = layer.router.weight_ED[0]  # all weights are 1/2
        noisy, plain = layer(x_TD, None, ids).hidden, layer.eval()(x_TD, None, ids).hidden
    assert torch.equal(noisy, plain) and plain.any()


def test_noise_is_in_training_alone() -> None:
    router, x_TD = router_of(in_float64(4, 2, jitter=0.25)), draw(2, TOKENS, WIDTH)
    torch.manual_seed(3)
    noisy = router(x_TD).logits_TE
    torch.manual_seed(3)
    assert torch.equal(noisy, (router.jitter(x_TD) @ router.weight_ED.T))
    plain = router.eval()(x_TD).logits_TE
    assert torch.equal(plain, x_TD @ router.weight_ED.T) and (plain - noisy).abs().min() > 0


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (24, 3), (4, 1)])
def test_forced_balance_of_ranks_with_one_token_each(experts: int, top_k: int) -> None:
    """As in decoding: all ranks together use every expert that they can, none more than others."""
    counts_E = torch.zeros(experts, dtype=torch.int64)
    for rank in range(8):
        with fake_world(8, rank):
            mesh = MoEMesh.init("cpu", dp=2, cp=2, tp=2, ep=4)
            router = Router(RouterConfig(experts, top_k, force_balance=True), WIDTH, mesh)
            with torch.no_grad():
                router.weight_ED.fill_(1)
            counts_E += router(torch.ones(1, WIDTH)).counts_E
    assert counts_E.tolist() == [8 * top_k // experts] * experts


def test_forced_balance_does_not_count_padding() -> None:
    router = router_of(in_float64(4, 1, force_balance=True))
    mask = torch.arange(16) % 4 == 0
    assert router(draw(0, 16, WIDTH), mask).counts_E.tolist() == [1] * 4


@pytest.mark.parametrize("by", ["cast", "default"])
def test_the_selection_bias_is_in_float32_whatever_the_model_is(by: str) -> None:
    """Steps of 0.001 are lost in bfloat16."""
    torch.set_default_dtype(torch.bfloat16 if by == "default" else torch.float32)
    try:
        router = Router(RouterConfig(4, 2), WIDTH, MoEMesh.single()).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert router.bias_E.dtype is torch.float32 and router.weight_ED.dtype is torch.bfloat16
