"""Targets that cannot be compared: one clear line, status 2, nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional

from spmd_moe import CP, DP, TP, I, MoEMesh, R, V
from spmd_moe.check import Case, Layout, MeshSizes, parity, run_parity
from spmd_moe.check.parity import run_one_rank as run_module
from spmd_moe.check.parity.cpu_stand_ins import STAND_INS, installed
from spmd_moe.check.parity.report import ParityReport
from spmd_moe.check.target import CannotCheckError
from spmd_moe.core.placement import Placement
from tests.check.test_parity import DP2, DP2_TP2, TP2, mlp
from tests.support.command_server import Commands
from tests.support.layer_targets import layer
from tests.support.parity_modules import MLP

DP4 = MeshSizes((("dp", 4), ("tp", 1)))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = threading.active_count(), torch.get_rng_state(), functional.dropout, Tensor.to
    yield
    assert threading.active_count() == before[0] and not dist.is_initialized()
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (functional.dropout, Tensor.to) == before[2:]


def linear(mesh: DeviceMesh, *, fault: str) -> Case:
    """A replicated layer on dp, with something in the way of a comparison."""
    rank, ranks = dist.get_rank(), mesh.size()
    module: nn.Module = nn.Linear(4, 4)
    x = torch.randn(8, 4)
    words, out = "dp 0", None
    call: Callable[..., object] | None = None
    if fault == "axis":
        words = "data 0"
    elif fault == "dim":
        words = "dp 2"
    elif fault == "word":
        words = "dp zero"
    elif fault == "twice":
        words = "dp 0, dp 1"
    elif (fault == "raises" and rank == 1) or fault == "raises alone":
        call = raising
    elif fault == "waits" and rank == 1:
        call = waiting
    elif fault == "sleeps" and rank == 1:
        call = sleeping
    elif fault == "other shapes" and rank == 1:
        module = nn.Linear(4, 3)
    elif fault == "other names" and ranks > 1:
        module = nn.Sequential(module)
    elif fault == "nothing returned":
        call = nothing
    elif fault == "random":
        call = partial(noisy, module)
    elif fault == "rounded":
        call = partial(rounded, module)
    elif fault == "meta":
        module = nn.Linear(4, 4, device="meta")
    elif fault == "dead":
        call = partial(dead, module)
    elif fault == "refused":
        raise ValueError("no layout will do")
    elif fault == "out":
        out = {"result": "data 0"}
    return Case(module, (x,), (words,), call=call, out=out, trainer="sum dp")


def raising(x: Tensor) -> Tensor:
    raise KeyError("weight")


def waiting(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def sleeping(x: Tensor) -> Tensor:
    while True:
        time.sleep(0.01)


def nothing(x: Tensor) -> str:
    return "nothing"


def noisy(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y + torch.rand_like(y)


def rounded(module: nn.Module, x: Tensor) -> Tensor:
    """In another order of operations where there are more ranks."""
    n = dist.get_world_size() + 1
    y: Tensor = module(x)
    return (y / n).bfloat16().double() * n


def dead(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y * 0


SAID = {
    "axis": "the mesh has no axis 'data'; it has dp, tp",
    "dim": r"it has shape \[8, 4\], and no dim 2",
    "word": "'dp zero' is no placement in words",
    "twice": "'dp 0, dp 1' names axis 'dp' twice",
    "raises": "on rank 1 it raises KeyError: 'weight'",
    "raises alone": "on one process it raises KeyError: 'weight'",
    "waits": r"wait for each other without end at .*test_parity_bad_input.py",
    "sleeps": r"wait for each other without end",
    "other shapes": r"ranks have \[4, 4\] or \[3, 4\] of f64\[4, 4\], sharded over what",
    "other names": "TARGET, 0.weight: there is such a parameter on a rank and not on one process",
    "nothing returned": "the call returns no tensor",
    "random": "output result is not the same when it is run again on one process",
    "rounded": "the module computes in bf16",
    "meta": "weight lies on the meta device and has no values",
    "out": "the mesh has no axis 'data'",
}


@pytest.mark.parametrize("fault", SAID)
def test_what_cannot_be_compared_is_told(fault: str) -> None:
    seconds = 1.0 if fault in ("waits", "sleeps") else 20.0
    target = partial(linear, fault=fault)  # processes: test_parity_processes
    report = run_parity(target, layouts=[DP2], seconds=seconds, ranks="threads")
    assert report.status == 2 and not report.findings()
    [outcome] = report.outcomes
    assert outcome.failed.startswith("TARGET") and "at:  tests/check/" in outcome.failed
    with pytest.raises(CannotCheckError, match=SAID[fault]):
        raise CannotCheckError(outcome.failed)


def test_everything_zero_is_not_a_success() -> None:
    report = run_parity(partial(linear, fault="dead"), layouts=[DP2], steps=1)
    alive = report.compared - len(report.dead)
    assert "output result" in report.dead and alive == 2  # the parameters after the step
    frozen = run_parity(frozen_and_dead, layouts=[DP2])
    assert frozen.compared == len(frozen.dead) > 0
    assert frozen.status == 2 and "every compared tensor is zero" in str(frozen)
    with pytest.raises(CannotCheckError, match="every compared tensor is zero"):
        parity(frozen_and_dead, layouts=[DP2])


def frozen_and_dead(mesh: DeviceMesh) -> Case:
    return Case(nn.Identity(), (torch.randn(8, 4),), ("dp 0",), call=lambda x: x * 0)


def test_a_layout_that_every_target_refuses() -> None:
    with pytest.raises(CannotCheckError, match="every layout is refused; the last: no layout"):
        run_parity(partial(linear, fault="refused"), layouts=[DP2])


def test_no_layout_and_no_step() -> None:
    with pytest.raises(CannotCheckError, match="0 configurations, 2 steps"):
        run_parity(mlp, world=1)


def test_a_trainer_and_a_stand_in_that_there_are_not() -> None:
    target = partial(mlp, trainer="sum up")
    report = run_parity(target, layouts=[DP2], tokens=(8,), ranks="threads")
    assert "'sum up' names 'up', which is no axis" in report.outcomes[0].failed
    fixes = '  fix: trainer="sum dp"\n  fix: --axes up,dp,tp   # or axes=... in Python\n'
    assert fixes in report.outcomes[0].failed
    with pytest.raises(CannotCheckError, match="there is no stand-in 'gpu'"):
        run_parity(mlp, layouts=[DP2], stand_ins=("gpu",))


def test_no_case_and_no_tensor() -> None:
    for target, said in ((lambda mesh: nn.Identity(), "not a Case"), (empty, "none of the arg")):
        assert said in run_parity(target, layouts=[DP2]).outcomes[0].failed


def empty(mesh: DeviceMesh) -> Case:
    return Case(nn.Identity(), ("x",))


def ambiguous(mesh: DeviceMesh) -> Case:
    """Of two axes of as many ranks, one shards the weights, and no smaller layout is done."""
    if mesh.size() == 2:
        raise ValueError("all four ranks, or one")
    module = MLP(8, 16, mesh.get_group("tp"))
    return Case(module, (torch.randn(8, 8),), ("dp 0",), trainer="sum dp")


def test_what_shapes_do_not_decide_is_asked() -> None:
    report = run_parity(ambiguous, layouts=[DP2_TP2])
    failed = report.outcomes[0].failed
    assert "TARGET, up: ranks have [8, 8] of f64[16, 8]: sharded as 'dp 0' or as 'tp 0'" in failed
    assert "weights={'up': 'tp 0'}" in failed


def test_other_layouts_run_on_when_one_cannot() -> None:
    report = run_parity(only_two, layouts=[DP4, DP2], ranks="threads")
    assert [bool(o.failed) for o in report.outcomes] == [True, False]
    assert report.status == 2 and "1 could not be compared" in str(report)


def only_two(mesh: DeviceMesh) -> Case:
    call = raising if mesh.size() == 4 else None
    return Case(nn.Linear(4, 4), (torch.randn(8, 4),), ("dp 0",), call=call, trainer="sum dp")


def test_a_defect_of_the_checker_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise KeyError("of the checker")

    broken.__code__ = broken.__code__.replace(co_filename=run_module.__file__)
    monkeypatch.setattr(run_module, "_argument_parts", broken)
    report = run_parity(partial(linear, fault=""), layouts=[DP2], ranks="threads")
    assert report.status == 2
    assert "spmd-moe: the checker itself fails at" in report.outcomes[0].failed
    assert "it says nothing about the module" in report.outcomes[0].failed


# --- meshes, stand-ins, seams -------------------------------------------------------------------


def folded(mesh: DeviceMesh) -> Case:
    """Weights over an axis of another mesh of the same ranks, which is named in words."""
    every = init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("all",))
    module = MLP(8, 16, every.get_group("all"))
    words = {"up": "all 0", "down": "all 1"}
    return Case(module, (torch.randn(8, 8),), meshes=(every,), weights=words)


def test_axes_of_a_second_mesh() -> None:
    parity(folded, layouts=[DP2_TP2])


def test_the_users_own_names() -> None:
    def target(mesh: DeviceMesh) -> Case:
        module = MLP(8, 16, mesh.get_group("cut"))
        return Case(module, (torch.randn(8, 8),), ("copies 0",), trainer="sum copies")

    report = parity(target, axes=("copies", "cut"), world=2)
    assert [str(o.question) for o in report.outcomes] == ["cut 2", "copies 2"]


def test_dropout_is_off_and_then_on_again() -> None:
    def target(mesh: DeviceMesh) -> Case:
        module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        return Case(module, (torch.randn(8, 4),), ("dp 0",), trainer="sum dp")

    parity(target, layouts=[DP2])
    with torch.random.fork_rng():
        assert not functional.dropout(torch.ones(100), 0.5).all()


def test_stand_ins_are_in_place_for_a_run_alone() -> None:
    before = torch.histc, torch.autocast
    with installed(list(STAND_INS)):
        assert torch.ones(2, dtype=torch.float64).bfloat16().dtype == torch.float64
        assert torch.histc(torch.tensor([0, 1, 1]), bins=2, min=0, max=1).tolist() == [1, 2]
        x, w = torch.arange(6.0).view(3, 2).double(), torch.arange(16.0).view(2, 2, 4).double()
        rows = functional.grouped_mm(x, w, offs=torch.tensor([1, 3], dtype=torch.int32))
        assert torch.equal(rows, torch.cat([x[:1] @ w[0], x[1:] @ w[1]]))
    assert (torch.histc, torch.autocast) == before
    report = run_parity(partial(linear, fault="rounded"), layouts=[DP2], stand_ins=["float64"])
    assert report.status == 0 and "stand-in: casts to bfloat16" in str(report)


def test_both_sides_can_be_observed() -> None:
    seen: list[int | None] = []

    class Entered:
        def __init__(self, module: nn.Module, rank: int | None) -> None:
            seen.append(rank)

        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    parity(mlp, layouts=[TP2], tokens=(8,), steps=1, observe=Entered)
    assert sorted(map(str, seen)) == ["0", "1", "None"]


# --- our layer ----------------------------------------------------------------------------------


def typed(mesh: MoEMesh, tokens: int) -> Case:
    case = layer()(mesh, tokens)
    out = {"*losses*": "dp P, cp P, tp P", "*counts*": "dp P, cp P, tp P"}
    return Case(case.module, case.args, case.placements, out=out)


def test_our_layer_by_its_declarations() -> None:
    layouts = [Layout(dp=2, tp=2, ep=2, etp=2), Layout(tp=2, ep=2)]
    report: ParityReport = parity(typed, layouts=layouts, tokens=(6,))
    assert report.compared > 20


def test_words_are_not_for_the_traced_check() -> None:
    case = Case(nn.Identity(), (torch.ones(2),), ("dp 0",))
    with pytest.raises(CannotCheckError, match="the placement of argument 0 is in words"):
        case.tensors()
    placed = Placement((DP[V], CP[R], TP[I]))
    assert Case(nn.Identity(), (torch.ones(2),), (placed,)).tensors()[0][1] == placed


# --- the command line ---------------------------------------------------------------------------


BAD = {
    "no.such:target": "cannot be imported",
    "tests.check.test_parity:mlp --layout tp_two": "'tp_two' is no mesh",
    "transformers:nothing": "there is no transformers:nothing",
    "torchtitan:moe --plan no": "there is no torchtitan:moe --plan no",
    "megatron:moe --plan no": "there is no megatron:moe --plan no",
    "deepspeed:moe --plan no": "there is no deepspeed:moe --plan no",
    "deepspeed:moe --path /nowhere": "deepspeed cannot be imported",
}


def test_the_command_line() -> None:
    few = ["parity", "tests.check.test_parity:mlp", "--layout", "tp 2", "--tokens", "8"]
    bad = [["parity", *words.split()] for words in BAD]
    server = Commands()
    try:
        asked = [[*few, "--steps", "1"], [*few, "--vary", "fault=divided,"], *bad]
        right, wrong, *others = server.run_all(asked)
    finally:
        server.close()
    assert right.status == 0 and "ok       tp 2, 8 tokens   8 tensors" in right.out
    assert wrong.status == 1 and "exactly where fault is divided" in wrong.out
    for done, said in zip(others, BAD.values(), strict=True):
        assert done.status == 2 and said in done.err
