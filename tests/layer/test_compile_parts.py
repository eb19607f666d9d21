"""Experts and Router under torch.compile: one graph, and the values and gradients of eager.

The backend is aot_eager, which traces forward and backward and then runs the traced operators as
they are: what differs from eager would be our fault, not the kernels'.
"""

# Shape letters in this file:
#   T  tokens     R  rows, sorted by expert     e  experts     E  experts
#   K  experts per token     D  model width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.layer.activations import CLAMPED_SWIGLU, GELU, SQUARED_RELU, SWIGLU, Activation
from spmd_moe.layer.experts import Gather, experts_ffn
from spmd_moe.layer.grouped_matmul import GroupedMatmul, LoopedMatmul, TorchGroupedMM
from spmd_moe.layer.moe_config import ExpertRecompute
from spmd_moe.layer.router import Router, Routing
from spmd_moe.layer.router_config import RouterConfig
from tests.support.experts_oracle import WIDTH, Case, OneHot, weights_in

MIXED = (3, 0, 5, 1)
WAYS: list[tuple[torch.dtype, GroupedMatmul | None]] = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.float32, OneHot()),
    (torch.bfloat16, LoopedMatmul(compute=torch.float32)),
    (torch.bfloat16, TorchGroupedMM()),
]
TWO_WAYS: list[tuple[torch.dtype, GroupedMatmul | None]] = [
    (torch.float64, None),
    (torch.bfloat16, TorchGroupedMM()),
]
pytestmark = [
    pytest.mark.usefixtures("no_graphs_of_others"),
    # Dynamo makes an instance of an autograd.Function while it traces `apply` (torch 2.13).
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
Module = Callable[..., Any]


@pytest.fixture
def no_graphs_of_others() -> None:
    """Or the limit on graphs of one function is reached by all tests together."""
    torch._dynamo.reset()


def one_graph(module: Module) -> Module:
    """Compiled whole: `fullgraph` raises where a graph would break."""
    compiled: Module = torch.compile(module, fullgraph=True, backend="aot_eager")
    return compiled


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The operators are the same, so the bits are; only their order may be the compiler's."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.any(), f"{name}: nothing was compared"
        bits = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}
        off = bits[value.dtype] if value.is_floating_point() else 0.0
        near = off * value.abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=0, atol=near, msg=name)


# --- experts ----------------------------------------------------------------------------------


def called(
    case: Case, module: nn.Module, call: Module, counts: tuple[int, ...]
) -> dict[str, Tensor]:
    """The output of `call`, which is the module or its graph, and all gradients."""
    given = replace(case, counts=counts).leaves()
    leaves = {"x": given["x"], "scores": given["scores"]} | dict(module.named_parameters())
    module.zero_grad()
    y = call(given["x"], torch.tensor(counts), given["scores"])
    y.backward(replace(case, counts=counts).upstream())
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    found = {name: grad for name, grad in grads.items() if grad is not None}
    assert found.keys() == grads.keys(), f"no gradient: {grads.keys() - found.keys()}"
    return {"y": y.detach()} | found


@pytest.mark.parametrize(
    ("keep", "bias"),
    [(ExpertRecompute.NONE, True), (ExpertRecompute.FIRST_MATMULS, False)],
    ids=["kept", "nothing"],
)
@pytest.mark.parametrize(("dtype", "matmul"), WAYS, ids=str)
def test_experts_are_one_graph(
    dtype: torch.dtype, matmul: GroupedMatmul | None, keep: ExpertRecompute, bias: bool
) -> None:
    """Counts are data: the one graph serves all of them."""
    case = Case(SWIGLU, MIXED, bias, dtype=dtype)
    layer = case.layer(matmul, keep)
    compiled = one_graph(layer)
    same(called(case, layer, compiled, MIXED), called(case, layer, layer, MIXED))
    with torch.compiler.set_stance("fail_on_recompile"):
        for counts in ((0, 0, 9, 0), (9, 0, 0, 0), (2, 3, 2, 2)):
            same(called(case, layer, compiled, counts), called(case, layer, layer, counts))


@pytest.mark.parametrize(
    "activation", [CLAMPED_SWIGLU, SQUARED_RELU, GELU], ids=lambda a: a.name.split("(")[0]
)
@pytest.mark.parametrize(("dtype", "matmul"), TWO_WAYS, ids=str)
def test_every_activation_is_one_graph(
    dtype: torch.dtype, matmul: GroupedMatmul | None, activation: Activation
) -> None:
    case = Case(activation, MIXED, bias=True, dtype=dtype)
    layer = case.layer(matmul)
    same(called(case, layer, one_graph(layer), MIXED), called(case, layer, layer, MIXED))


@pytest.mark.parametrize(("dtype", "matmul"), TWO_WAYS, ids=str)
def test_any_number_of_rows_is_one_graph(dtype: torch.dtype, matmul: GroupedMatmul | None) -> None:
    """Rows change on every step, so their number must not be built in."""
    case = Case(SWIGLU, MIXED, bias=True, dtype=dtype)
    layer = case.layer(matmul)
    compiled: Module = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    same(called(case, layer, compiled, MIXED), called(case, layer, layer, MIXED))
    with torch.compiler.set_stance("fail_on_recompile"):
        for counts in ((5, 0, 6, 2), (0, 40, 0, 0)):
            same(called(case, layer, compiled, counts), called(case, layer, layer, counts))


@pytest.mark.parametrize(("dtype", "matmul"), TWO_WAYS, ids=str)
def test_gathered_experts_are_one_graph(dtype: torch.dtype, matmul: GroupedMatmul | None) -> None:
    T, K = 6, 2
    ids_N = torch.tensor([0, 2, 2, 3, 0, 2, 3, 2, 0, 3, 0, 2])
    order, counts_e = ids_N.argsort(stable=True), ids_N.bincount(minlength=4)
    row_TK = torch.empty_like(order).scatter_(0, order, torch.arange(T * K)).view(T, K)
    case = Case(SWIGLU, tuple(counts_e.tolist()), dtype=dtype)
    layer, results = case.layer(matmul), []
    for call in (layer, one_graph(layer)):
        x_TD = case.drawn("x", T, WIDTH).requires_grad_()
        layer.zero_grad()
        y = call(x_TD, counts_e, case.drawn("s", T * K), Gather(order // K, row_TK))
        y.backward(case.drawn("dy", *y.shape))
        assert x_TD.grad is not None and layer.w1_eFD.grad is not None
        results.append({"y": y.detach(), "x": x_TD.grad, "w1": layer.w1_eFD.grad})
    same(results[1], results[0])


@pytest.mark.parametrize("matmul", [LoopedMatmul(), OneHot()], ids=str)
def test_rows_past_the_end_in_one_graph(matmul: GroupedMatmul) -> None:
    case = Case(SWIGLU, MIXED, bias=True, past=3)
    w = weights_in(case.weights())

    def call(x: Tensor, scores: Tensor) -> Tensor:
        counts_e = torch.tensor(case.counts)
        return experts_ffn(x, counts_e, w, scores, None, SWIGLU, matmul, padded=True)

    results = []
    for form in (call, one_graph(call)):
        given = case.leaves()
        y = form(given["x"], given["scores"])
        y.backward(case.upstream())
        assert given["x"].grad is not None and given["scores"].grad is not None
        results.append({"y": y.detach(), "x": given["x"].grad, "scores": given["scores"].grad})
    same(results[1], results[0])
    assert not any(t[9:].any() for t in results[1].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_grouped_matmul_compiles_in_bf16_only(dtype: torch.dtype) -> None:
    """Why these are not among the cases above: torch 2.13 says so of its shapes, not of its kernel.

    It costs nothing: on a CPU the layer chooses the loop, and on a GPU this one for bf16 alone.
    When torch can do it this test fails, and the dtypes belong into WAYS.
    """
    case = Case(SWIGLU, MIXED, dtype=dtype)
    layer = case.layer(TorchGroupedMM())
    with pytest.raises(RuntimeError, match="Expected inputs of BF16 type"):
        called(case, layer, one_graph(layer), MIXED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_operators_keep_their_promises(dtype: torch.dtype) -> None:
    """Shapes without data are those with data, and no argument is written to."""
    case = Case(SWIGLU, MIXED, past=2)
    given = {name: t.detach() for name, t in case.leaves().items()}
    ends_e, x_RD = torch.tensor(case.counts).cumsum(0).to(torch.int32), given["x"]
    checks, ops = ("test_schema", "test_faketensor"), torch.ops.spmd_moe
    w = given["w1_eFD"].mT.to(dtype)
    for row_block in (1, 4):
        torch.library.opcheck(ops.rows.default, (x_RD, w, ends_e, row_block), test_utils=checks)
    y_RF = ops.rows.default(x_RD, w, ends_e, 1)
    torch.library.opcheck(ops.outer.default, (y_RF, x_RD, ends_e, dtype), test_utils=checks)


# --- router -----------------------------------------------------------------------------------

TOKENS = 10
ROUTERS = {
    "softmax": RouterConfig(8, 2),
    "softmax_chosen": RouterConfig(8, 2, "softmax_chosen"),
    "sigmoid": RouterConfig(8, 3, "sigmoid", route_norm=True, route_scale=2.5),
    "sqrt_softplus": RouterConfig(8, 2, "sqrt_softplus"),
    "groups": RouterConfig(
        8, 2, "sigmoid", route_norm=True, num_expert_groups=4, num_limited_groups=2
    ),
    "balanced": RouterConfig(8, 2, force_balance=True),
    "double": RouterConfig(8, 2, dtype=torch.float64),
}


def routed(
    router: Router,
    call: Module,
    dtype: torch.dtype,
    *,
    mask: bool,
    ids: bool,
    tokens: int = TOKENS,
) -> dict[str, Tensor]:
    """All that the router says of some tokens, and the gradients of a sum of it."""
    case = Case(SWIGLU, (), dtype=dtype)
    x_TD = case.drawn("x", tokens, WIDTH).requires_grad_()
    mask_T = torch.arange(tokens) % 3 > 0 if mask else None
    ids_TK = None
    if ids:
        K = router.config.top_k
        ids_TK = torch.arange(tokens * K).view(tokens, K) % 8
        ids_TK[4] = -1
    router.zero_grad()
    routing: Routing = call(x_TD, mask_T, ids_TK)
    assert routing.complete is not (mask or ids)
    loss = torch.zeros((), dtype=torch.float64)
    for values in (routing.scores_TK, routing.logits_TE, routing.probs_TE):
        weight = case.drawn(str(tuple(values.shape)), *values.shape).double()
        loss = loss + (values.double() * weight).sum()
    loss.backward()
    assert x_TD.grad is not None and router.weight_ED.grad is not None
    return {
        "ids": routing.expert_ids_TK,
        "scores": routing.scores_TK.detach(),
        "logits": routing.logits_TE.detach(),
        "probs": routing.probs_TE.detach(),
        "counts": routing.counts_E,
        "x": x_TD.grad,
        "weight": router.weight_ED.grad,
    }


def make_router(config: RouterConfig, dtype: torch.dtype) -> Router:
    router, case = Router(config, WIDTH, MoEMesh.single()).to(dtype), Case(SWIGLU, ())
    with torch.no_grad():
        router.weight_ED.copy_(case.drawn("router", *router.weight_ED.shape) * 0.3)
        router.bias_E.copy_(case.drawn("selection bias", 8) * 0.1)
    return router


@pytest.mark.parametrize(
    ("name", "dtype", "training"),
    [
        *((name, torch.float64, True) for name in ROUTERS),
        ("softmax", torch.float32, False),
        ("groups", torch.float32, True),
        ("groups", torch.bfloat16, False),
        ("double", torch.bfloat16, True),
    ],
    ids=str,
)
def test_router_is_one_graph(name: str, dtype: torch.dtype, training: bool) -> None:
    router = make_router(ROUTERS[name], dtype).train(training)
    compiled = one_graph(router)
    same(
        routed(router, compiled, dtype, mask=False, ids=False),
        routed(router, router, dtype, mask=False, ids=False),
    )


@pytest.mark.parametrize(("mask", "ids"), [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("name", ["softmax_chosen", "groups"])
def test_router_with_tokens_left_out_is_one_graph(name: str, mask: bool, ids: bool) -> None:
    router = make_router(ROUTERS[name], torch.float64)
    compiled = one_graph(router)
    same(
        routed(router, compiled, torch.float64, mask=mask, ids=ids),
        routed(router, router, torch.float64, mask=mask, ids=ids),
    )


@pytest.mark.parametrize(
    ("name", "dtype", "mask"),
    [("groups", torch.bfloat16, True), ("balanced", torch.float32, False)],
)
def test_any_number_of_tokens_is_one_graph(name: str, dtype: torch.dtype, mask: bool) -> None:
    router = make_router(ROUTERS[name], dtype)
    compiled: Module = torch.compile(router, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(tokens: int) -> None:
        got, want = (
            routed(router, call, dtype, mask=mask, ids=False, tokens=tokens)
            for call in (compiled, router)
        )
        same(got, want)

    check(TOKENS)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (TOKENS + 1, 3, 40):
            check(tokens)


def test_jitter_is_not_in_the_graph() -> None:
    """Its noise has a generator of its own, seeded by a drawn number; the compiler takes neither.

    Evaluation adds no noise, and is one graph.
    """
    router = make_router(RouterConfig(8, 2, jitter=0.1), torch.float32)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"item|Generator|data-dependent"):
        routed(router, one_graph(router), torch.float32, mask=False, ids=False)
    router.eval()
    same(
        routed(router, one_graph(router), torch.float32, mask=False, ids=False),
        routed(router, router, torch.float32, mask=False, ids=False),
    )
