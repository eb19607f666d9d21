"""The experts against a loop in float64: values and every gradient, on every path."""

# Shape letters in this file:
#   T  tokens     R  rows, sorted by expert     e  experts     D  model width
#   K  experts per token

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.layer.activations import (
    CLAMPED_SWIGLU,
    GELU,
    SQUARED_RELU,
    SWIGLU,
    Activation,
    clamped_swiglu,
)
from spmd_moe.layer.experts import Experts, Gather, experts_ffn
from spmd_moe.layer.grouped_ffn import Weights
from spmd_moe.layer.grouped_matmul import GroupedMatmul, LoopedMatmul, TorchGroupedMM
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import ExpertRecompute, MoEConfig, ScoreApplication
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.train.init_weights import init_weights
from tests.support.experts_oracle import HIDDEN, WIDTH, Case, OneHot, compare

ACTIVATIONS = [SWIGLU, CLAMPED_SWIGLU, SQUARED_RELU, GELU]
# Rows per expert: an expert without, all rows on one, none at all, one each.
COUNTS = [(3, 0, 5, 1), (0, 0, 9, 0), (0, 0, 0, 0), (1, 1, 1, 1)]
MIXED = COUNTS[0]
# float64 is the loop's own arithmetic in another order. float32 and bf16 round at 2**-24 and 2**-9,
# a few times in a row; widened, bf16 rounds what is kept and what comes out.
WAYS: list[tuple[torch.dtype, GroupedMatmul, float]] = [
    (torch.float64, LoopedMatmul(), 1e-13),
    (torch.float64, LoopedMatmul(row_block=4), 1e-13),
    (torch.float64, OneHot(), 1e-13),
    (torch.float32, LoopedMatmul(), 2e-6),
    (torch.float32, TorchGroupedMM(), 2e-6),
    (torch.bfloat16, LoopedMatmul(compute=torch.float32), 1e-2),
    (torch.bfloat16, LoopedMatmul(), 2e-2),
    (torch.bfloat16, TorchGroupedMM(), 2e-2),
]
by_name = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name.split("(")[0])
both_ways = pytest.mark.parametrize("matmul", [LoopedMatmul(), TorchGroupedMM()], ids=str)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@by_name
@pytest.mark.parametrize(("dtype", "matmul", "tolerance"), WAYS, ids=str)
def test_the_kernels_equal_the_loop(
    dtype: torch.dtype, matmul: GroupedMatmul, tolerance: float, activation: Activation, bias: bool
) -> None:
    for counts, past, scored, keep in product(COUNTS, (0, 3), (True, False), ExpertRecompute):
        case = Case(activation, counts, bias, scored, past, dtype)
        compare(case, case.by_function(matmul, keep), tolerance)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@by_name
@pytest.mark.parametrize(("dtype", "matmul", "tolerance"), WAYS, ids=str)
def test_the_layer_equals_the_loop(
    dtype: torch.dtype, matmul: GroupedMatmul, tolerance: float, activation: Activation, bias: bool
) -> None:
    """Without rows, too, every parameter has a gradient: `compare` asks for each by its name."""
    for counts, scored in product(COUNTS, (True, False)):
        case = Case(activation, counts, bias, scored, dtype=dtype)
        compare(case, case.by_layer(matmul), tolerance)


@by_name
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_odd_widths(dtype: torch.dtype, tolerance: float, activation: Activation) -> None:
    """No width is a multiple of 16 bytes, which grouped kernels refuse: the layer's own choice."""
    case = Case(activation, MIXED, bias=True, dtype=dtype, widths=(5, 7))
    compare(case, case.by_layer(None), tolerance)
    case = replace(case, past=2)
    compare(case, case.by_function(LoopedMatmul()), tolerance)


@by_name
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_one_expert_after_another_equals_all_at_once(
    dtype: torch.dtype, tolerance: float, activation: Activation
) -> None:
    """In bf16 closer to each other than to the truth: they round at the same places."""
    for counts in COUNTS:
        case = Case(activation, counts, bias=True, dtype=dtype)
        one, all_at_once = case.by_function(LoopedMatmul()), case.by_function(TorchGroupedMM())
        for name, want in one.items():
            assert bool(want.any()) is (sum(counts) > 0), name
            near = want.abs().max().item() * tolerance if want.numel() else 0.0
            torch.testing.assert_close(all_at_once[name], want, rtol=0, atol=near)


@by_name
@pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda k: k.value)
@pytest.mark.parametrize("matmul", [LoopedMatmul(), OneHot()], ids=str)
def test_gradients_are_slopes(
    matmul: GroupedMatmul, keep: ExpertRecompute, activation: Activation
) -> None:
    case = Case(activation, (1, 0, 2), bias=True, past=1, widths=(3, 2))
    leaves = {n: t.detach().nan_to_num().requires_grad_() for n, t in case.leaves().items()}

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(leaves, values, strict=True))
        return case.kernel(given, matmul, keep)

    assert torch.autograd.gradcheck(call, list(leaves.values()))


def test_the_clamps_clamp() -> None:
    """Or the cases above would not tell clamped SwiGLU from one without limits."""
    case = Case(CLAMPED_SWIGLU, MIXED, bias=True)
    free = replace(case, activation=clamped_swiglu(limit=1e9))
    limited, unlimited = case.by_function(LoopedMatmul()), free.by_function(LoopedMatmul())
    for name in ("y", "x", "w1_eFD", "w3_eFD", "b1_eF", "b3_eF"):
        assert (limited[name] - unlimited[name]).abs().max() > 0.1, name


@by_name
def test_a_derivative_left_out_is_derived(activation: Activation) -> None:
    # torch.func cannot look into forwards that work in place.
    pure = {SWIGLU.name: _silu_times, SQUARED_RELU.name: lambda gate, up: fn.relu(gate) ** 2}
    forward = pure.get(activation.name, activation.forward)
    derived = Activation(f"derived {activation.name}", activation.gated, forward)
    case = Case(activation, MIXED, bias=True)
    for matmul in (LoopedMatmul(), OneHot()):
        got = replace(case, activation=derived).by_function(matmul)
        for name, want in case.by_function(matmul).items():
            assert want.any()
            torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)


def _silu_times(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
    assert up_RF is not None
    return fn.silu(gate_RF) * up_RF


def test_equal_numbers_are_one_activation() -> None:
    assert clamped_swiglu() is CLAMPED_SWIGLU
    assert clamped_swiglu(limit=5.0) is not CLAMPED_SWIGLU


# --- what is asked for ------------------------------------------------------------------------


@pytest.mark.parametrize("matmul", [LoopedMatmul(), OneHot()], ids=str)
@pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda k: k.value)
def test_one_gradient_alone(matmul: GroupedMatmul, keep: ExpertRecompute) -> None:
    """Each leaf trains alone, all others frozen, and gets the bits that it gets among all."""
    case = Case(SWIGLU, MIXED, bias=True)
    among_all = case.by_function(matmul, keep)
    for alone in case.leaves():
        given = case.leaves()
        for name, leaf in given.items():
            leaf.requires_grad_(name == alone)
        case.kernel(given, matmul, keep).backward(case.upstream())
        for name, leaf in given.items():
            assert (leaf.grad is not None) is (name == alone)
        grad = given[alone].grad
        assert grad is not None and grad.any() and torch.equal(grad, among_all[alone]), alone


@both_ways
def test_gradients_have_the_dtype_of_what_they_belong_to(matmul: GroupedMatmul) -> None:
    case = Case(SWIGLU, MIXED, bias=True, dtype=torch.bfloat16)
    for found in (case.by_function(matmul), case.by_layer(matmul)):
        assert found["scores"].dtype is torch.float32
        assert all(t.dtype is torch.bfloat16 for name, t in found.items() if name != "scores")


@both_ways
def test_weights_of_rows_are_not_rounded(matmul: GroupedMatmul) -> None:
    """With matrices of ones on the diagonal a row comes out as its h, times its float32 weight."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(9, 16, generator=draw).to(torch.bfloat16) for _ in range(2))
    scores_R = torch.rand(9, generator=draw).requires_grad_()
    w = Weights(w1_eFD=torch.eye(16)[None].to(x.dtype), w2_eDF=torch.eye(16)[None].to(x.dtype))
    y = experts_ffn(x, torch.tensor([9]), w, scores_R, None, SQUARED_RELU, matmul)
    h = fn.relu(x) ** 2
    want, rounded = h * scores_R.unsqueeze(1), h * scores_R.to(x.dtype).unsqueeze(1)
    assert torch.equal(y, want.to(x.dtype)) and not torch.equal(y, rounded)
    (found,) = torch.autograd.grad(y, scores_R, dy)
    slopes = (dy * h).sum(1, dtype=torch.float32)
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-6)
    assert (slopes.to(x.dtype) - slopes).abs().max() > 1e-3


@pytest.mark.parametrize("matmul", [LoopedMatmul(), OneHot()], ids=str)
@pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda k: k.value)
def test_gather_inside_equals_gather_outside(matmul: GroupedMatmul, keep: ExpertRecompute) -> None:
    T, K = 6, 2
    ids_N = torch.tensor([0, 2, 2, 3, 0, 2, 3, 2, 0, 3, 0, 2])
    order = ids_N.argsort(stable=True)
    row_TK = torch.empty_like(order).scatter_(0, order, torch.arange(T * K)).view(T, K)
    case = Case(SWIGLU, tuple(ids_N.bincount(minlength=4).tolist()))
    scores_R, counts_e = case.drawn("s", T * K), torch.tensor(case.counts)
    results = []
    for inside in (False, True):
        x_TD, layer = case.drawn("x", T, WIDTH).requires_grad_(), case.layer(matmul, keep)
        token_R = order // K
        x, gather = (x_TD, Gather(token_R, row_TK)) if inside else (x_TD[token_R], None)
        y = layer(x, counts_e, scores_R, gather)
        y.backward(case.drawn("dy", *y.shape))
        assert x_TD.grad is not None and layer.w3_eFD is not None
        results.append([y, x_TD.grad, layer.w1_eFD.grad, layer.w3_eFD.grad, layer.w2_eDF.grad])
    for want, got in zip(*results, strict=True):
        assert want is not None and want.any()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# --- in the layer -----------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_weighing_early_equals_weighing_late(activation: Activation, bias: bool) -> None:
    """Before the second matmul or in combine: the same layer, up to rounding."""
    results = []
    for weigh in (ScoreApplication.BEFORE_SECOND_MATMUL, ScoreApplication.IN_COMBINE):
        router = RouterConfig(4, 2, dtype=torch.float64)
        config = MoEConfig(
            WIDTH, HIDDEN, router, activation=activation, bias=bias, score_application=weigh
        )
        layer, case = MoE(config, MoEMesh.single()).double(), Case(activation, ())
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(case.drawn(name, *parameter.shape) * 0.8)
        x = case.drawn("x", 7, WIDTH).requires_grad_()
        y = layer(x).hidden
        y.backward(case.drawn("dy", 7, WIDTH))
        results.append({"y": y, "x": x.grad} | {n: p.grad for n, p in layer.named_parameters()})
    early, late = results
    assert early.keys() == late.keys() and "router.weight_ED" in early
    for name, want in late.items():
        assert want is not None and want.any(), name
        torch.testing.assert_close(early[name], want, rtol=0, atol=1e-12 * want.abs().max().item())


def slice_of_the_hidden_dim(case: Case) -> dict[str, Tensor]:
    """What one of two ranks of etp gets, and which slice of the hidden dim it has."""
    rank, mesh = dist.get_rank(), MoEMesh.init("cpu", tp=2, etp=2)
    layer = Experts(
        4,
        WIDTH,
        HIDDEN,
        mesh,
        activation=case.activation,
        bias=True,
        recompute=ExpertRecompute.NONE,
    ).to(case.dtype)
    own = slice(rank * HIDDEN // 2, (rank + 1) * HIDDEN // 2)
    cuts = {"w1_eFD": (..., own, slice(None)), "w3_eFD": (..., own, slice(None)), "b2_eD": (...,)}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            whole = case.weights()[name]
            parameter.copy_(whole[cuts.get(name, (..., own))])
    given = case.leaves()
    y = layer(given["x"], torch.tensor(case.counts), given["scores"])
    y.backward(case.upstream())
    leaves = {"x": given["x"], "scores": given["scores"]} | dict(layer.named_parameters())
    return {"y": y.detach()} | {name: cast(Tensor, leaf.grad) for name, leaf in leaves.items()}


@by_name
def test_slices_of_the_hidden_dim_add_up(activation: Activation) -> None:
    """On two ranks of etp: rows and scores have parts of a sum; the last bias is added once."""
    case = Case(activation, MIXED, bias=True)
    first, second = threaded(2, slice_of_the_hidden_dim, case)
    joined = {name: first[name] + second[name] for name in ("y", "x", "scores")}
    assert torch.equal(first["b2_eD"], second["b2_eD"])
    joined["b2_eD"] = first["b2_eD"]
    for name in first.keys() - joined.keys():
        dim = 1 if name in ("w1_eFD", "w3_eFD") else -1
        joined[name] = torch.cat([first[name], second[name]], dim)
    compare(case, joined, 1e-13)


def test_initial_weights_are_small_and_biases_zero() -> None:
    """Fresh from `init_weights`, the layer's output is there, and small."""
    case = Case(SWIGLU, MIXED, bias=True)
    layer = case.layer(None)
    init_weights(layer, MoEMesh.single(), seed=0)
    assert layer.b1_eF is not None and not layer.b1_eF.any()
    y = layer(case.leaves()["x"], torch.tensor(case.counts))
    assert 0 < y.abs().max() < 0.1


@by_name
def test_activations_leave_backward_to_autograd(activation: Activation) -> None:
    """As shared experts use them: nothing that autograd keeps is overwritten."""
    random = torch.Generator().manual_seed(0)
    leaves = torch.randn(2, 3, 4, generator=random, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(
        lambda gate, up: activation.forward(gate * 1, up * 1 if activation.gated else None),
        [leaf.clone().requires_grad_() for leaf in leaves],
    )
