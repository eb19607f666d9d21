"""A learned bias of the router: a part of the logits, in values and in gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spmd_moe import MoE, MoEConfig, MoEMesh, R, RouterConfig, init_weights, reduce_gradients
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.router import Router

CONFIG = RouterConfig(8, 3, score_func="softmax_chosen", bias=True)


def router() -> Router:
    torch.manual_seed(0)
    made = Router(CONFIG, 6, MoEMesh.single()).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def test_it_is_added_to_the_logits() -> None:
    this, x_TD = router(), torch.randn(5, 6, dtype=torch.float64)
    assert this.b_E is not None
    routing = this(x_TD)
    logits = x_TD.float() @ this.weight_ED.float().T + this.b_E.float()
    torch.testing.assert_close(routing.logits_TE, logits)
    assert torch.equal(routing.expert_ids_TK, routing.logits_TE.topk(3, dim=1).indices)
    weights = logits.gather(1, routing.expert_ids_TK).softmax(1)
    torch.testing.assert_close(routing.scores_TK, weights)
    (grad,) = torch.autograd.grad(routing.scores_TK.square().sum(), this.b_E)
    (expected,) = torch.autograd.grad(weights.square().sum(), this.b_E)
    torch.testing.assert_close(grad, expected)
    assert grad.abs().max() > 0


def test_padding_has_no_logits() -> None:
    mask_T = torch.tensor([True, False])
    routing = router()(torch.randn(2, 6, dtype=torch.float64), mask_T)
    assert routing.logits_TE[0].all() and not routing.logits_TE[1].any()


def test_without_it_there_is_no_parameter() -> None:
    plain = Router(replace(CONFIG, bias=False), 6, MoEMesh.single())
    assert plain.b_E is None and [n for n, _ in plain.named_parameters()] == ["weight_ED"]


def gradient(degrees: dict[str, int], tokens: Tensor) -> Tensor:
    """Of the bias, on a mesh whose ranks of tp have the same tokens."""
    mesh = MoEMesh.init("cpu", **degrees)
    layer = MoE(MoEConfig(6, 4, CONFIG, src=R, dst=R), mesh)
    init_weights(layer, mesh, seed=0, std=1.0)
    b_E = layer.router.b_E
    assert b_E is not None and not b_E.any()  # init_weights takes it for the bias that it is
    with torch.no_grad():
        b_E.copy_(torch.linspace(-1, 1, 8))
    own = tokens.tensor_split(degrees.get("dp", 1))
    number = mesh.dense.get_local_rank("dp")
    (layer(own[number]).hidden.square().sum() / degrees.get("tp", 1)).backward()
    reduce_gradients(layer, mesh)
    assert b_E.grad is not None
    return b_E.grad


def test_gradients_on_ranks() -> None:
    tokens = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    (alone,) = threaded(1, gradient, {}, tokens)
    for degrees in ({"dp": 4, "ep": 4}, {"dp": 2, "tp": 2, "ep": 2}, {"tp": 4, "ep": 2, "etp": 2}):
        for found in threaded(4, gradient, degrees, tokens):
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
