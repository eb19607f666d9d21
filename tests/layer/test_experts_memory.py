"""What waits for backward, counted in bytes, beside the same written in plain autograd."""

# Shape letters in this file:
#   T  tokens     R  rows, sorted by expert     e  experts     D  model width     F  hidden width
#   K  experts per token     B  any width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.layer import grouped_ffn
from spmd_moe.layer.activations import CLAMPED_SWIGLU, GELU, SQUARED_RELU, SWIGLU, Activation
from spmd_moe.layer.experts import Experts, Gather
from spmd_moe.layer.grouped_matmul import GroupedMatmul, LoopedMatmul, TorchGroupedMM
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import ExpertRecompute, MoEConfig, ScoreApplication
from spmd_moe.layer.router_config import RouterConfig
from tests.support.experts_oracle import Case

E, K, T = 8, 4, 16
ROWS = T * K
WAYS: list[tuple[torch.dtype, GroupedMatmul]] = [
    (torch.float32, LoopedMatmul()),
    (torch.float32, TorchGroupedMM()),
    (torch.bfloat16, LoopedMatmul(compute=torch.float32)),
    (torch.bfloat16, TorchGroupedMM()),
]
ways = pytest.mark.parametrize(("dtype", "matmul"), WAYS, ids=str)


@dataclass(frozen=True)
class Run:
    """Tokens that are routed, and the experts they go to."""

    layer: Experts
    x_TD: Tensor
    scores_R: Tensor
    counts_e: Tensor
    gather: Gather

    @staticmethod
    def make(
        activation: Activation,
        dtype: torch.dtype,
        matmul: GroupedMatmul,
        keep: ExpertRecompute = ExpertRecompute.NONE,
        *,
        bias: bool = False,
        widths: tuple[int, int] = (64, 64),
    ) -> Run:
        ids_N = torch.randint(E, (ROWS,), generator=torch.Generator().manual_seed(0))
        counts_e, order = ids_N.bincount(minlength=E), ids_N.argsort(stable=True)
        row_TK = torch.empty_like(order).scatter_(0, order, torch.arange(ROWS)).view(T, K)
        case = Case(activation, tuple(counts_e.tolist()), bias, dtype=dtype, widths=widths)
        x_TD = case.drawn("x", T, widths[0]).requires_grad_()
        scores_R = case.drawn("scores", ROWS).float().requires_grad_()
        layer = case.layer(matmul, keep)
        return Run(layer, x_TD, scores_R, counts_e, Gather(order // K, row_TK))

    def __call__(self) -> Tensor:
        y_RD: Tensor = self.layer(self.x_TD, self.counts_e, self.scores_R, self.gather)
        return y_RD

    def composed(self) -> Tensor:
        """The same in plain autograd: torch decides what is saved."""
        layer, ends_e = self.layer, self.counts_e.cumsum(0).to(torch.int32)
        expert_R = torch.arange(E).repeat_interleave(self.counts_e)

        def linear(x: Tensor, w_eBA: Tensor, b_eB: Tensor | None) -> Tensor:
            y = fn.grouped_mm(x, w_eBA.mT, offs=ends_e)
            return y if b_eB is None else y + b_eB[expert_R]

        x_RD = self.x_TD[self.gather.token_R]
        gate_RF = linear(x_RD, layer.w1_eFD, layer.b1_eF)
        if layer.w3_eFD is None:
            gelu = layer.activation is GELU
            h_RF = fn.gelu(gate_RF) if gelu else fn.relu(gate_RF).square()
        else:
            up_RF = linear(x_RD, layer.w3_eFD, layer.b3_eF)
            if layer.activation is SWIGLU:
                h_RF = fn.silu(gate_RF) * up_RF
            else:
                gate_RF, up_RF = gate_RF.clamp(max=7.0), up_RF.clamp(-7.0, 7.0)
                h_RF = gate_RF * torch.sigmoid(1.702 * gate_RF) * (up_RF + 1)
        y_RD = linear(h_RF, layer.w2_eDF, layer.b2_eD)
        return y_RD * self.scores_R.unsqueeze(1).to(y_RD.dtype)

    def given(self) -> list[Tensor]:
        """What the caller holds anyway."""
        return [self.x_TD, self.scores_R, self.counts_e, *self.gather, *self.layer.parameters()]


def saved_by(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and every tensor that autograd was handed for backward."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return run(), saved


def address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def saved_bytes(run: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """Bytes kept, each storage counted whole and once; what the caller holds is left out."""
    y, saved = saved_by(run)
    assert y.requires_grad and saved
    storages = {address(t): t.untyped_storage().nbytes() for t in saved}
    for t in given:
        storages.pop(address(t), None)
    return sum(storages.values())


@ways
@pytest.mark.parametrize(
    "activation", [SWIGLU, CLAMPED_SWIGLU, SQUARED_RELU, GELU], ids=lambda a: a.name
)
@pytest.mark.parametrize("widths", [(128, 64), (64, 64), (64, 128)], ids=str)
def test_saved_bytes(
    widths: tuple[int, int], activation: Activation, dtype: torch.dtype, matmul: GroupedMatmul
) -> None:
    """Gate and up, in the dtype of the rows; with recompute nothing at all."""
    run = Run.make(activation, dtype, matmul, widths=widths)
    plain = saved_bytes(run.composed, run.given())
    kept = saved_bytes(run, run.given())
    assert kept == ROWS * widths[1] * dtype.itemsize * (2 if activation.gated else 1)
    assert kept <= 0.45 * plain
    run = Run.make(activation, dtype, matmul, ExpertRecompute.FIRST_MATMULS, widths=widths)
    nothing = saved_bytes(run, run.given())
    assert nothing == 0 <= 0.02 * plain


@ways
def test_saved_bytes_with_biases(dtype: torch.dtype, matmul: GroupedMatmul) -> None:
    """The last bias keeps two numbers per row and expert: which expert, and with what weight."""
    D, F = widths = (256, 256)  # GPT-OSS has one width, too
    which = ROWS * E * (torch.bool.itemsize + dtype.itemsize)
    for keep, hidden, most in (
        (ExpertRecompute.NONE, 2 * ROWS * F * dtype.itemsize, 0.45),
        (ExpertRecompute.FIRST_MATMULS, 0, 0.02),
    ):
        run = Run.make(CLAMPED_SWIGLU, dtype, matmul, keep, bias=True, widths=widths)
        plain, kept = saved_bytes(run.composed, run.given()), saved_bytes(run, run.given())
        assert kept == hidden + which
        assert kept <= most * plain
        assert plain > ROWS * (2 * D + 4 * F) * dtype.itemsize


@ways
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_both_forms_compute_the_same(dtype: torch.dtype, matmul: GroupedMatmul, bias: bool) -> None:
    """Or the bytes of one would say nothing of the other."""
    for activation in (SWIGLU, CLAMPED_SWIGLU, SQUARED_RELU, GELU):
        run = Run.make(activation, dtype, matmul, bias=bias)
        y, want = run(), run.composed()
        assert want.any()
        near = want.abs().max().item() * (2e-6 if dtype is torch.float32 else 2e-2)
        torch.testing.assert_close(y, want, rtol=0, atol=near)


@ways
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda k: k.value)
def test_the_output_is_not_saved(
    keep: ExpertRecompute, bias: bool, dtype: torch.dtype, matmul: GroupedMatmul
) -> None:
    run = Run.make(SWIGLU, dtype, matmul, keep, bias=bias, widths=(64, 48))
    y_RD, saved = saved_by(run)
    assert address(y_RD) not in map(address, saved)
    # Nor is anything else as wide as rows: not the gathered rows, not what bias is added to.
    assert [t.shape for t in saved if t.shape == y_RD.shape] == []
    want, saved = saved_by(run.composed)
    assert any(t.shape == want.shape for t in saved), "this test cannot fail"


@ways
@pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda k: k.value)
def test_nothing_hides_from_the_count(
    keep: ExpertRecompute, dtype: torch.dtype, matmul: GroupedMatmul
) -> None:
    """A tensor put on the node itself would wait for backward without passing the hooks."""
    y_RD = Run.make(SWIGLU, dtype, matmul, keep)()
    node = y_RD.grad_fn
    assert node is not None and "recipe" in vars(node)
    assert [name for name, value in vars(node).items() if isinstance(value, Tensor)] == []


@ways
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("keep", ExpertRecompute, ids=lambda k: k.value)
def test_without_grad_nothing_is_saved(
    keep: ExpertRecompute,
    bias: bool,
    dtype: torch.dtype,
    matmul: GroupedMatmul,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run.make(SWIGLU, dtype, matmul, keep, bias=bias)
    with_grad, saved = saved_by(run)
    assert saved
    # Not even written: what is never read is not computed into tensors of its own.
    monkeypatch.setattr(grouped_ffn._GroupedFFN, "apply", None)
    with torch.no_grad():
        y_RD, saved = saved_by(run)
    assert not saved and not y_RD.requires_grad
    assert y_RD.any() and torch.equal(y_RD, with_grad)
    for leaf in (run.x_TD, run.scores_R, *run.layer.parameters()):
        leaf.requires_grad_(False)
    y_RD, saved = saved_by(run)
    assert not saved and not y_RD.requires_grad and torch.equal(y_RD, with_grad)


def outputs_of(experts: Experts) -> list[Tensor]:
    """A list that grows by what the experts return."""
    outputs: list[Tensor] = []
    experts.register_forward_hook(lambda module, args, y_RD: outputs.append(y_RD))
    return outputs


def hidden_of(layer: MoE, x: Tensor, mask: Tensor | None = None) -> Tensor:
    y: Tensor = layer(x, mask).hidden
    return y


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_weighing_early_spares_the_layer_the_outputs(bias: bool) -> None:
    """Weighed in combine, the experts' outputs wait for the gradient of the weights."""
    saved_outputs = {}
    for weigh in ScoreApplication:
        config = MoEConfig(64, 48, RouterConfig(E, K), score_application=weigh, bias=bias)
        layer = MoE(config, MoEMesh.single())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        outputs = outputs_of(layer.experts)
        y, saved = saved_by(partial(hidden_of, layer, torch.ones(T, 64, requires_grad=True)))
        assert y.any() and len(outputs) == 1
        saved_outputs[weigh] = address(outputs[0]) in map(address, saved)
    assert saved_outputs == {
        ScoreApplication.BEFORE_SECOND_MATMUL: False,
        ScoreApplication.IN_COMBINE: True,
        ScoreApplication.ON_INPUT: False,
    }
