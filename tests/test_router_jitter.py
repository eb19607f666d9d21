"""The router's noise on its inputs: of each rank its own, the same again, in training alone."""

from __future__ import annotations

import torch
from torch import Tensor

from spmd_moe import MoEMesh
from spmd_moe.router import Router, RouterConfig
from tests.simulate import fake_world
from tests.test_router import TOKENS, WIDTH, draw, in_float64, router_of


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


def test_noise_is_in_training_alone() -> None:
    router, x_TD = router_of(in_float64(4, 2, jitter=0.25)), draw(2, TOKENS, WIDTH)
    torch.manual_seed(3)
    noisy = router(x_TD).logits_TE
    torch.manual_seed(3)
    assert torch.equal(noisy, (router.jitter(x_TD) @ router.weight_ED.T))
    plain = router.eval()(x_TD).logits_TE
    assert torch.equal(plain, x_TD @ router.weight_ED.T) and (plain - noisy).abs().min() > 0
