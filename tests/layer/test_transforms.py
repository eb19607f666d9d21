"""Transforms of functions: export works, and others are refused with one error of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from spmd_moe import GradientError, MoE, MoEConfig, MoEMesh, RouterConfig, init_weights

X = torch.arange(12.0).view(3, 4) / 12
Call = Callable[[Tensor], Tensor]


def built() -> MoE:
    layer = MoE(MoEConfig(4, 3, RouterConfig(4, 2), bias=True), mesh := MoEMesh.single())
    init_weights(layer, mesh, seed=0, std=0.5)
    return layer.eval()


LAYER = built()


def hidden(x: Tensor) -> Tensor:
    y: Tensor = LAYER(x).hidden
    return y


def dual(weights: bool) -> None:
    layer = LAYER
    with forward_ad.dual_level():
        given = dict(layer.named_parameters())
        name = "experts.b1_eF" if weights else ""
        if weights:
            given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        x = X if weights else forward_ad.make_dual(X, X)
        torch.func.functional_call(layer, given, (x,))


BATCH = torch.ones(2, 3, 4)
REFUSED: dict[str, Callable[[], Any]] = {
    "grad": lambda: torch.func.grad(lambda x: hidden(x).sum())(X),
    "vmap": lambda: torch.func.vmap(hidden)(BATCH),
    "jvp": lambda: torch.func.jvp(hidden, (X,), (X,)),
    "jacrev": lambda: torch.func.jacrev(hidden)(X),
    "hessian": lambda: torch.func.hessian(lambda x: hidden(x).sum())(X),
    "dual tokens": lambda: dual(weights=False),
    "dual weights": lambda: dual(weights=True),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # forward AD loads it
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", REFUSED)
def test_transforms_are_refused(name: str, grad: bool) -> None:
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(GradientError, match=r"MoE\.forward: it is called under"),
    ):
        REFUSED[name]()


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_of_many_gradients_is_refused(create_graph: bool) -> None:
    inputs = [X.clone().requires_grad_()]
    y = hidden(inputs[0])
    with pytest.raises(GradientError, match="Experts: backward is under"):
        torch.autograd.grad(y, inputs, BATCH, is_grads_batched=True, create_graph=create_graph)
    with pytest.raises(GradientError, match="Experts: backward is under"):
        torch.autograd.functional.jacobian(hidden, X, vectorize=True)
    assert torch.autograd.functional.jacobian(hidden, X).any()


class Model(nn.Module):
    """An output that export can describe."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = built()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x).hidden
        return y


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [False, True])
def test_the_layer_is_exported(strict: bool, grad: bool) -> None:
    """For other tokens, which choose other experts; strict export drops gradients (torch 2.13)."""
    model = Model()
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(model, (X,), strict=strict).module()
    other = (X.flip(1) - 0.3).requires_grad_()
    assert not torch.equal(model.layer(X).counts_E, model.layer(other).counts_E)
    want, got = model(other), exported(other)
    torch.testing.assert_close(got, want)
    if not strict:
        slopes = [torch.autograd.grad(y.square().sum(), other)[0] for y in (got, want)]
        assert slopes[1].any()
        torch.testing.assert_close(*slopes)
