"""Second derivatives, against finite differences and against a plain layer."""

# Shape letters in this file:
#   T  tokens    D  model width    E  experts    K  experts per token

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spmd_moe import (
    CLAMPED_SWIGLU,
    GELU,
    SQUARED_RELU,
    SWIGLU,
    Activation,
    ExpertRecompute,
    LoopedMatmul,
    Masked,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    ScoreApplication,
    SharedConfig,
    init_weights,
)
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.experts import Gather
from spmd_moe.layer.grouped_matmul import GroupedMatmul
from tests.support.experts_oracle import Case, OneHot, loop

ACTIVATIONS = [SWIGLU, CLAMPED_SWIGLU, SQUARED_RELU, GELU]
by_name = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name.split("(")[0])
by_keep = pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda k: k.value)


def has_slopes(call: Callable[..., Tensor], leaves: Sequence[Tensor]) -> bool:
    """Along random directions, not element by element, which takes minutes."""
    torch.manual_seed(0)
    found: bool = torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    return found


@by_name
@by_keep
@pytest.mark.parametrize("matmul", [LoopedMatmul(), OneHot(), Masked()], ids=str)
def test_gradients_of_experts_have_slopes(
    matmul: GroupedMatmul, keep: ExpertRecompute, activation: Activation
) -> None:
    """Of rows, scores, weights and biases; an expert without rows, and a row past the end."""
    case = Case(activation, (1, 0, 2), bias=True, past=1, widths=(3, 2))
    leaves = {n: t.detach().nan_to_num().requires_grad_() for n, t in case.leaves().items()}

    def call(*values: Tensor) -> Tensor:
        return case.kernel(dict(zip(leaves, values, strict=True)), matmul, keep)

    assert has_slopes(call, list(leaves.values()))


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("matmul", [LoopedMatmul(), OneHot(), Masked()], ids=str)
def test_rows_past_the_end_reach_no_second_derivative(matmul: GroupedMatmul, past: int) -> None:
    """They are NaN, as are their weights; their gradient is infinite. Against the plain loop."""
    case = Case(SWIGLU, (3, 0, 5, 1), bias=True, past=past)
    results = []
    for plain in (True, False):
        given = case.leaves()
        total = sum(case.counts)
        if plain:
            safe = {n: t[:total] if n in ("x", "scores") else t for n, t in given.items()}
            y, dy = loop(safe, case.counts, SWIGLU.name), case.upstream()[:total]
        else:
            y, dy = case.kernel(given, matmul, ExpertRecompute.NONE), case.upstream()
        first = torch.autograd.grad(y, list(given.values()), dy, create_graph=True)
        weights = [case.drawn(f"v {n}", *t.shape) for n, t in given.items()]
        penalty = sum(
            (g[:total] * v[:total]).tanh().sum() for g, v in zip(first, weights, strict=True)
        )
        assert isinstance(penalty, Tensor)
        results.append(torch.autograd.grad(penalty, list(given.values())))
    for want, got in zip(*results, strict=True):
        assert want.any() and not got[9 if got.shape[0] > 4 else 4 :].any()
        rows = slice(0, sum(case.counts))
        torch.testing.assert_close(got[rows], want[rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("matmul", [LoopedMatmul(), OneHot()], ids=str)
@pytest.mark.parametrize("complete", [True, False])
def test_gathered_rows_have_second_derivatives(matmul: GroupedMatmul, complete: bool) -> None:
    """Tokens in place of rows; `complete`: each has all of its K rows."""
    T, K, D = 3, 2, 3
    ids = torch.tensor([0, 2, 2, 3, 0, 2])[: T * K if complete else 5]
    order = ids.argsort(stable=True)
    row_TK = torch.full((T * K,), len(ids)).scatter_(0, order, torch.arange(len(ids))).view(T, K)
    case = Case(SWIGLU, tuple(ids.bincount(minlength=4).tolist()), widths=(D, 2))
    layer, counts_e = case.layer(matmul), torch.tensor(case.counts)

    def call(x_TD: Tensor, scores_R: Tensor) -> Tensor:
        y_RD: Tensor = layer(x_TD, counts_e, scores_R, Gather(order // K, row_TK))
        return y_RD

    leaves = case.drawn("x", T, D).requires_grad_(), case.drawn("s", len(ids)).requires_grad_()
    assert has_slopes(call, leaves)


def test_a_third_derivative() -> None:
    case = Case(GELU, (1, 2), widths=(2, 2))
    layer, counts_e = case.layer(None), torch.tensor(case.counts)

    def slopes(x: Tensor) -> Tensor:
        return torch.autograd.grad(layer(x, counts_e).square().sum(), x, create_graph=True)[0]

    assert has_slopes(slopes, [case.drawn("x", 3, 2).requires_grad_()])


# --- the layer ----------------------------------------------------------------------------------

ROUTER = RouterConfig(4, 2, dtype=torch.float64)
PLAIN = MoEConfig(4, 3, ROUTER)
CONFIGS = {
    "plain": PLAIN,
    "recompute": replace(PLAIN, recompute=ExpertRecompute.FIRST_MATMULS),
    "in combine": replace(PLAIN, score_application=ScoreApplication.IN_COMBINE, bias=True),
    "bias": replace(PLAIN, bias=True, activation=CLAMPED_SWIGLU),
    "sigmoid": replace(PLAIN, router=replace(ROUTER, score_func="sigmoid", route_norm=True)),
    "root": replace(PLAIN, router=replace(ROUTER, score_func="sqrt_softplus", route_norm=True)),
    "chosen": replace(PLAIN, router=replace(ROUTER, score_func="softmax_chosen")),
    "squared relu": replace(PLAIN, activation=SQUARED_RELU),
    "gelu": replace(PLAIN, activation=GELU, shared=SharedConfig(3, gated=True)),
}
by_config = pytest.mark.parametrize("name", CONFIGS)


def built(config: MoEConfig, mesh: MoEMesh | None = None, dtype: Any = torch.float64) -> MoE:
    mesh = mesh or MoEMesh.single()
    layer = MoE(config, mesh)
    init_weights(layer, mesh, seed=0, std=0.7)
    return layer.to(dtype)


def tokens(count: int = 3) -> Tensor:
    return Case(SWIGLU, ()).drawn("tokens", count, 4)


def of_weights(layer: MoE, mask: Tensor | None = None) -> Callable[..., Tensor]:
    """The layer's output as a function of tokens and of all its weights."""
    names = [name for name, _ in layer.named_parameters()]

    def call(x_TD: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        y: Tensor = torch.func.functional_call(layer, given, (x_TD, mask)).hidden
        return y

    return call


@by_config
def test_the_layers_gradients_have_slopes(name: str) -> None:
    layer = built(CONFIGS[name])
    leaves = [tokens().requires_grad_(), *layer.parameters()]
    assert has_slopes(of_weights(layer), leaves)


def test_padding_has_no_second_derivative() -> None:
    layer, mask = built(PLAIN), torch.tensor([True, False, True])
    assert has_slopes(of_weights(layer, mask), [tokens().requires_grad_(), *layer.parameters()])


def plain_layer(layer: MoE, x_TD: Tensor) -> Tensor:
    """The same as autograd alone would have it."""
    experts = layer.experts
    assert experts.w3_eFD is not None
    probs_TE = (x_TD @ layer.router.weight_ED.T).softmax(1)
    scores_TK, ids_TK = probs_TE.topk(2)
    gate = torch.einsum("td,tkfd->tkf", x_TD, experts.w1_eFD[ids_TK])
    up = torch.einsum("td,tkfd->tkf", x_TD, experts.w3_eFD[ids_TK])
    h = gate * gate.sigmoid() * up
    return torch.einsum("tkf,tkdf,tk->td", h, experts.w2_eDF[ids_TK], scores_TK)


def test_torchs_functions_of_second_derivatives() -> None:
    layer, x, v = built(PLAIN), tokens(), torch.ones(3, 4, dtype=torch.float64)
    ours: Callable[[Tensor], Tensor] = lambda x: layer(x).hidden.square().sum()  # noqa: E731
    plain: Callable[[Tensor], Tensor] = lambda x: plain_layer(layer, x).square().sum()  # noqa: E731
    functional = torch.autograd.functional
    for name in ("hessian", "hvp", "vhp"):
        find, vector = getattr(functional, name), () if name == "hessian" else (v,)
        found, expected = find(ours, x, *vector), find(plain, x, *vector)
        got, want = (found, expected) if name == "hessian" else (found[1], expected[1])
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss", ["norm", "square"])
def test_a_gradient_penalty(loss: str) -> None:
    """Of x, of the router and of the experts; by `backward(inputs=[x])` and by `autograd.grad`."""
    layer, results = built(PLAIN), []
    calls: list[Callable[[Tensor], Tensor]]
    calls = [lambda x: layer(x).hidden, lambda x: plain_layer(layer, x)]
    for call in calls:
        x = tokens().requires_grad_()
        y = call(x).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        penalty = dx.norm() if loss == "norm" else dx.square().sum()
        found = torch.autograd.grad(penalty, [x, *layer.parameters()], retain_graph=True)
        torch.autograd.backward(penalty, inputs=[x])
        assert x.grad is not None
        results.append([*found, x.grad])
    for got, want in zip(*results, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def penalized(ranks: int, degrees: dict[str, int]) -> list[Tensor]:
    """The gradients of a penalty on this rank's tokens, of which all ranks have as many."""
    mesh = MoEMesh.init("cpu", **degrees) if ranks > 1 else MoEMesh.single()
    layer = built(replace(PLAIN, hidden_dim=4, shared=SharedConfig(4, sharded=True)), mesh)
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    x = tokens(8).chunk(ranks)[rank].clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).hidden.square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    return [dx.detach(), found]


@pytest.mark.parametrize(
    "degrees", [{"dp": 2, "ep": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}], ids=str
)
def test_second_derivatives_on_several_ranks(degrees: dict[str, int]) -> None:
    """Rows that are exchanged, and sums that are shared: as on one process."""
    alone = penalized(1, {})
    for number, want in enumerate(alone):
        parts = [found[number] for found in threaded(2, penalized, 2, degrees)]
        assert want.any()
        torch.testing.assert_close(torch.cat(parts), want, rtol=1e-10, atol=1e-10)
