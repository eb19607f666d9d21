"""Parity of small modules without types: silent where they are right, and true where not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from spmd_moe.check import Case, MeshSizes, parity, run_parity
from spmd_moe.check.parity.report import ParityReport
from spmd_moe.core.errors import PlacementError
from tests.support.parity_modules import (
    MLP,
    Block,
    DTensorGate,
    EPMoE,
    TPMoE,
    sharded,
)

TP2 = MeshSizes((("dp", 1), ("tp", 2)))
DP2 = MeshSizes((("dp", 2), ("tp", 1)))
DP2_TP2 = MeshSizes((("dp", 2), ("tp", 2)))
ALL = [TP2, DP2, DP2_TP2]
Target = Callable[..., Case]


def mlp(mesh: DeviceMesh, tokens: int = 8, *, fault: str = "", trainer: str = "sum dp") -> Case:
    module = MLP(8, 16, mesh.get_group("tp"), fault)
    return Case(module, (torch.randn(tokens, 8),), ("dp 0",), trainer=trainer)


def tp_moe(mesh: DeviceMesh, fault: str = "") -> Case:
    module = TPMoE(8, 16, mesh.get_group("tp"), fault)
    return Case(module, (torch.randn(8, 8),), ("dp 0",), trainer="sum dp")


def ep_moe(mesh: DeviceMesh, fault: str = "", trainer: str = "sum dp") -> Case:
    module = EPMoE(8, mesh.get_group("dp"), fault)
    return Case(module, (torch.randn(12, 8),), ("dp 0",), trainer=trainer)


def block(mesh: DeviceMesh) -> Case:
    return Case(sharded(Block(8, 16), mesh), (torch.randn(8, 8),), ("dp 0",), trainer="sum dp")


def gate(mesh: DeviceMesh, fault: str = "") -> Case:
    module = DTensorGate(8, 16, mesh, fault)
    return Case(module, (torch.randn(8, 8),), ("dp 0",), trainer="sum dp")


def named(target: Target, **how: str) -> Target:
    made: Target = partial(target, **how)
    return made


def found(target: Target, **options: object) -> ParityReport:
    layouts = options.pop("layouts", ALL)
    return run_parity(target, layouts=layouts, tokens=(8,), **options)  # type: ignore[arg-type]  # passed on


@pytest.mark.parametrize("target", [mlp, tp_moe, ep_moe, block, gate], ids=lambda t: t.__name__)
def test_a_right_module_has_no_finding(target: Target) -> None:
    report = parity(target, layouts=ALL, tokens=(8,) if target is mlp else ())
    assert report.status == 0 and not report.dead
    assert report.compared == sum(o.compared.tensors for o in report.outcomes if o.compared) > 30


@pytest.mark.parametrize("tokens", [1, 7])
def test_tokens_that_cannot_be_shared_out_evenly(tokens: int) -> None:
    parity(mlp, layouts=[DP2_TP2], tokens=(tokens,))


WRONG = {
    "input not reduced": ("gradient of input x", "summed over tp it is right"),
    "input reduced twice": ("gradient of input x", "it is 2 times what is right, the size of tp"),
    "bias before the sum": ("output", "'bias' is added 2 times to every row, and once is right"),
    "part of rank 1 missing": ("output", "the part of rank 1 of tp is missing from it"),
    "output not reduced": ("output", "before 'bias' is added, summed over tp it is right"),
    "divided": ("output", "before 'bias' is added, it is 1/2 of what is right"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_mlp_is_told_what_would_make_it_right(fault: str) -> None:
    what, right = WRONG[fault]
    report = found(named(mlp, fault=fault))
    assert report.status == 1
    [text] = report.findings()
    assert text.startswith(what) and f"why: {right}" in text
    assert "in:  tp 2, 8 tokens and 1 more configuration" in text
    assert "exactly where tp > 1; not in dp 2, 8 tokens" in text
    assert "tests/support/parity_modules.py:" in text


def only_finding(report: ParityReport) -> str:
    assert report.status == 1
    [text] = report.findings()
    return text


def test_a_router_whose_gradient_is_not_summed() -> None:
    text = only_finding(run_parity(named(tp_moe, fault="router not reduced"), layouts=ALL))
    assert text.startswith("gradient of gate.weight: not that of one process on all ranks")
    assert "why: summed over tp it is right" in text and "norm / true norm 0." in text
    assert "also off, perhaps because of it: gradient of input x" in text


def test_a_dtensor_whose_partial_gradient_is_lost() -> None:
    text = only_finding(run_parity(named(gate, fault="gate not reduced"), layouts=[TP2]))
    assert text.startswith("gradient of gate:") and "why: summed over tp it is right" in text


def test_rows_that_come_back_in_another_order() -> None:
    text = only_finding(run_parity(named(ep_moe, fault="wrong order"), layouts=[DP2]))
    assert "why: its rows are those of other rows times a factor: permuted" in text


def test_a_rank_that_answers_with_zeros() -> None:
    fault = "rank 1 answers with zeros"
    text = only_finding(run_parity(named(ep_moe, fault=fault), layouts=[DP2]))
    assert "why: the part of rank 1 of dp is missing from it" in text


def test_a_buffer_that_drifts_apart() -> None:
    fault = "counts of this rank alone"
    text = only_finding(run_parity(named(ep_moe, fault=fault), layouts=ALL))
    assert text.startswith("buffer load_bias:") and "copies on the ranks of dp drift apart" in text
    assert "exactly where dp > 1" in text


# --- what the trainer does ----------------------------------------------------------------------


def test_without_a_trainer_the_sum_over_dp_is_missing() -> None:
    text = only_finding(found(named(mlp, trainer="nothing"), layouts=[DP2]))
    assert text.startswith("gradient of up, gradient of down, gradient of bias:")
    assert "why: summed over dp it is right" in text and 'fix: trainer="sum dp"' in text


def test_a_trainer_that_averages_has_a_loss_that_is_larger() -> None:
    parity(named(mlp, trainer="average dp"), layouts=ALL, tokens=(8,))
    parity(named(ep_moe, trainer="average dp"), layouts=[DP2])


def averaged(mesh: DeviceMesh, *, right: bool) -> Case:
    """A trainer of the user's own, which sums, or forgets that losses are means on each rank."""

    def after(module: nn.Module, mesh: DeviceMesh) -> None:
        for parameter in module.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=mesh.get_group("dp"))
            if not right:
                parameter.grad /= mesh["dp"].size()

    module = MLP(8, 16, mesh.get_group("tp"))
    return Case(module, (torch.randn(8, 8),), ("dp 0",), trainer=after)


def test_a_trainer_of_the_users_own() -> None:
    parity(partial(averaged, right=True), layouts=[DP2])
    text = only_finding(run_parity(partial(averaged, right=False), layouts=[DP2]))
    assert "why: it is 1/2 of what is right, one part in the size of dp" in text


def fully_sharded(mesh: DeviceMesh, fault: str = "") -> Case:
    module = Plain(fault if mesh.size() > 1 else "")
    return Case(module, (torch.randn(8, 8),), ("dp 0",), trainer="fully_shard dp")


class Plain(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.up, self.down, self.fault = nn.Linear(8, 6), nn.Linear(6, 8), fault

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y * 2 if self.fault else y


def test_fully_shard_runs_in_threads() -> None:
    parity(fully_sharded, layouts=[DP2])
    text = only_finding(run_parity(partial(fully_sharded, fault="twice"), layouts=[DP2]))
    assert "why: it is 2 times what is right" in text


def loss_of_ranks(mesh: DeviceMesh, *, terms: str) -> Case:
    module = nn.Linear(8, 8)

    def call(x: Tensor) -> dict[str, Tensor]:
        y = module(x)
        aux = (y * y).sum()
        return {"y": y, "aux": aux * mesh.size() if terms == "too large" else aux}

    out = {"*y*": "dp 0", "*aux*": "dp P"}
    return Case(module, (torch.randn(8, 8),), ("dp 0",), call=call, out=out, trainer="sum dp")


def test_the_scale_of_a_loss_term() -> None:
    four = MeshSizes((("dp", 4), ("tp", 1)))
    parity(partial(loss_of_ranks, terms="right"), layouts=[four])
    report = run_parity(partial(loss_of_ranks, terms="too large"), layouts=[four])
    text = only_finding(report)
    assert text.startswith("output ['aux']:") and "it is 4 times what is right" in text


def test_a_finding_is_raised_in_a_test() -> None:
    with pytest.raises(PlacementError, match="summed over tp it is right"):
        parity(named(mlp, fault="input not reduced"), layouts=[TP2], tokens=(8,))


# --- low precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [mlp, tp_moe, ep_moe, block, gate], ids=lambda t: t.__name__)
def test_a_right_module_has_no_finding_in_bfloat16(target: Target) -> None:
    tokens = (8,) if target is mlp else ()
    report = run_parity(target, layouts=ALL, tokens=tokens, dtype=torch.bfloat16)
    assert report.status == 0 and report.compared > 15


@pytest.mark.parametrize("fault", WRONG)
def test_the_same_is_found_in_bfloat16(fault: str) -> None:
    what, right = WRONG[fault]
    wrong = named(mlp, fault=fault)
    text = only_finding(run_parity(wrong, layouts=[TP2], tokens=(8,), dtype=torch.bfloat16))
    assert text.startswith(what) and f"why: {right}" in text and "bf16" in text


@pytest.mark.parametrize(
    ("target", "fault", "layout"),
    [
        (tp_moe, "router not reduced", TP2),
        (gate, "gate not reduced", TP2),
        (ep_moe, "wrong order", DP2),
        (ep_moe, "rank 1 answers with zeros", DP2),
    ],
)
def test_other_faults_in_bfloat16(target: Target, fault: str, layout: MeshSizes) -> None:
    low = run_parity(named(target, fault=fault), layouts=[layout], dtype=torch.bfloat16)
    wide = run_parity(named(target, fault=fault), layouts=[layout])
    assert [c.key for c in low.causes()] == [c.key for c in wide.causes()] != []


# --- a rank that has no part in it --------------------------------------------------------------


def halves(mesh: DeviceMesh) -> Case:
    """Two DTensors, of which each half of the tokens uses one: ranks of dp lack a gradient."""
    module = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    whole = [0, 0, 0, 0, 1, 1, 1, 1]
    if mesh.size() > 1:
        for n, parameter in enumerate(module):
            module[n] = nn.Parameter(DTensor.from_local(parameter.data, mesh["tp"], [Replicate()]))

    def call(x: Tensor, which: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for n, parameter in enumerate(module):
            rows = (which == n).nonzero()[:, 0]
            if len(rows):
                weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                out = out.index_add(0, rows, x[rows] @ weight)
        return out

    args = torch.randn(8, 4), torch.tensor(whole)
    return Case(module, args, ("dp 0", "dp 0"), call=call, trainer="sum dp")


def test_a_dtensor_without_a_gradient_on_some_ranks() -> None:
    report = parity(halves, layouts=[DP2, DP2_TP2])
    assert report.status == 0 and report.compared == 2 * 2 * 6  # layouts, steps, tensors


def rows(mesh: DeviceMesh) -> Case:
    """A DTensor on a slice of the mesh; its gradient is Partial, and the output has more rows."""
    module = nn.Linear(4, 4, bias=False)
    if mesh.size() > 1:
        weight = DTensor.from_local(module.weight.data, mesh["tp"], [Replicate()])
        module.weight = nn.Parameter(weight)

    def call(x: Tensor) -> Tensor:
        weight = module.weight
        if isinstance(weight, DTensor):
            return DTensor.from_local(x, weight.device_mesh, [Shard(0)]) @ weight
        return x @ weight

    return Case(module, (torch.randn(8, 4),), ("dp 0, tp 0",), call=call, trainer="sum dp")


def test_a_partial_gradient_on_a_slice_of_the_mesh() -> None:
    assert parity(rows, layouts=ALL).status == 0
