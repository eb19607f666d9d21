"""The sanitizer in training jobs on real ranks: it finds what goes wrong, where, and at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import permutations
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from spmd_moe import (
    DP,
    TP,
    ConfigError,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    init_weights,
    sanitize,
)
from spmd_moe.layer.router import _best
from spmd_moe.sanitize.tensor_digest import COLUMNS, fingerprint, sketch
from tests.layer.test_moe_output import OF_DYNAMO
from tests.support.sanitized_job import LAST, Job, told
from tests.support.simulated_ranks import fake_world
from tests.support.workers import run

FOUR = {"dp": 2, "tp": 2, "ep": 2, "etp": 2}


# --- bugs that appear in a running job ----------------------------------------------------------


class Bug(NamedTuple):
    name: str
    where: str
    what: str
    late: int = 0  # steps after the one in which it appears
    says: bool = False  # the job calls `reduced`


BUGS = [
    Bug("router", "'moe.router.weight_ED': gradient", "is I on axis 'tp' (2 ranks)"),
    Bug("dropout", "Block.dropped: result f32[6, 8]", "is I on axis 'tp' (2 ranks)"),
    Bug("in place", "Block.dropped: result f32[6, 8]", "is I on axis 'tp' (2 ranks)"),
    Bug("twice", "'weight_DD': gradient", "2 times the sum of the ranks' parts over axis 'dp'"),
    Bug("twice", "'weight_DD': gradient", "2 times the sum", says=True),
    Bug("twice one", "'weight_DD': gradient", "usual in this step is 1 times"),
    Bug("tp too", "'moe.router.weight_ED': gradient", "2 times the sum"),
    Bug("unreduced", "'weight_DD': gradient", "is R on axis 'dp' (2 ranks)"),
    Bug("average one", "'weight_DD': gradient", "usual in this step is 0.5 times"),
    Bug("clip", "'weight_DD': gradient", "is R on axis 'dp' (2 ranks)"),
    Bug("sign", "'weight_DD': gradient", "no multiple of the sum"),
    Bug("bias", "'moe.router.bias_E': value", "is R on axis 'dp' (2 ranks)", late=1),
    Bug(
        "ahead",
        "sanitize: in step 2 the ranks diverge",
        "Block.dropped, argument x_TD on ranks [1]",
    ),
]


@pytest.mark.gloo
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.name}{' said' * bug.says}")
def test_a_bug_is_found_in_the_step_in_which_it_appears(bug: Bug) -> None:
    (step, text), *others = run(4, told, bug.name, 2, FOUR, 1.0, bug.says)
    assert all(other == (step, text) for other in others)  # alike on all ranks
    assert step == 2 + bug.late and f"in step {step}" in text
    assert text.startswith(bug.where) and bug.what in text
    assert re.search(r"\n  at:  tests/support/sanitized_job.py:\d+$", text)
    labels = [line[:7].strip() for line in text.splitlines()[1:]]
    assert labels == ["why:"] + ["fix:"] * (len(labels) - 2) + ["at:"]


@pytest.mark.gloo
@pytest.mark.parametrize("degrees", [FOUR, {"tp": 4, "ep": 2, "etp": 2}, {"dp": 4, "ep": 4}])
def test_a_job_without_bugs_runs_to_its_end(degrees: dict[str, int]) -> None:
    assert run(4, told, "", 0, degrees) == [(LAST, "")] * 4


@pytest.mark.gloo
@pytest.mark.parametrize("change", ["scale", "average", "clip", "sign"])
def test_gradients_may_be_changed_alike_or_after_they_were_looked_at(change: str) -> None:
    said = change in ("clip", "sign")
    assert run(2, told, change, 0, {"dp": 2}, 1.0, said) == [(LAST, "")] * 2


@pytest.mark.gloo
def test_what_appears_between_watched_steps_is_found_in_the_next() -> None:
    assert [step for step, _ in run(2, told, "dropout", 1, {"tp": 2}, 1 / 3)] == [3, 3]


@pytest.mark.gloo
def test_a_rate_of_nothing_finds_nothing() -> None:
    assert run(2, told, "dropout", 1, {"tp": 2}, 0.0) == [(LAST, "")] * 2


def forwards_only(by_step: bool, many: int) -> tuple[int, str]:
    """A loop without an optimizer, in which nothing is compared before there are many hashes."""
    job = Job("dropout", 0, tp=2)
    step = 0
    try:
        with (
            mock.patch("spmd_moe.sanitize.watch_job._MANY", many),
            sanitize(job.model, job.mesh, 1.0) as watcher,
            torch.inference_mode(),
        ):
            for step in range(3):
                job.model.seed = step + job.mesh[TP].rank
                job.model(torch.ones(3, 8))
                if by_step:
                    watcher.step()
    except Exception as error:
        return step, str(error)
    return step, ""


@pytest.mark.gloo
@pytest.mark.parametrize("by_step, many, ends", [(True, 99, 0), (False, 99, 2), (False, 9, 1)])
def test_a_loop_without_an_optimizer(by_step: bool, many: int, ends: int) -> None:
    """Steps end when the program ends them, with the job, or when the record is full."""
    for step, text in run(2, forwards_only, by_step, many):
        assert text.startswith("Block.dropped: result") and "in step 0" in text and step == ends


def recomputed(bug: bool) -> str:
    """Under activation checkpoints boundaries are passed again, in backward."""
    job = Job("", 0, dp=1, tp=2)
    try:
        with sanitize(job.model, job.mesh, 1.0):
            x = torch.ones(3, 8, requires_grad=True)
            y: Tensor = torch.utils.checkpoint.checkpoint(job.model, x, use_reentrant=False)
            job.model.seed = job.mesh[TP].rank * bug
            y.sum().backward()
            job.reduce()
            job.optimizer.step()
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_recomputation_is_watched_too() -> None:
    assert run(2, recomputed, False) == ["", ""]
    assert all("Block.dropped: result" in text for text in run(2, recomputed, True))


def other_rate() -> str:
    mesh = MoEMesh.init("cpu", dp=2)
    rate = "0.5" if mesh[DP].rank else "0"
    try:
        with (
            mock.patch.dict(os.environ, {"SPMD_MOE_SANITIZE": rate}),
            sanitize(nn.Linear(2, 2), mesh),
        ):
            pass
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_ranks_with_another_rate_are_told_at_once() -> None:
    for text in run(2, other_rate):
        assert "1 in=0 on ranks [0] | 1 in=2 on ranks [1]" in text


def with_fsdp(bug: str) -> tuple[int, str]:
    """Parameters stored in parts on dp; on tp all have the same part."""
    job = Job(bug, 1, dp=2, tp=2, ep=2)  # edp is dp, so that FSDP sums all that is to be summed
    model: nn.Module = job.model
    fully_shard(model, mesh=job.mesh.dense["dp"])
    job.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    job.reduce = lambda: None  # type: ignore[method-assign]  # FSDP does
    try:
        with sanitize(model, job.mesh, 1.0):
            job.run(3)
    except Exception as error:
        return job.step, str(error)
    return job.step, ""


@pytest.mark.gloo
@pytest.mark.parametrize(
    "bug, step, found",
    [
        ("", 2, ""),
        ("router", 1, "'moe.router.weight_ED': gradient f32[2, 8] is I on axis 'tp'"),
        ("dropout", 1, "Block.dropped: result f32[6, 8] is I on axis 'tp'"),
        ("bias", 2, "'moe.router.bias_E': value f32[4] is R on axis 'dp'"),
    ],
)
def test_under_fsdp(bug: str, step: int, found: str) -> None:
    ends = run(4, with_fsdp, bug)
    assert len(set(ends)) == 1 and ends[0][0] == step
    assert ends[0][1].startswith(found) and bool(ends[0][1]) == bool(found)


# --- what is left behind --------------------------------------------------------------------------


def layer_of_two() -> tuple[MoE, MoEMesh]:
    mesh = MoEMesh.init("cpu", tp=2)
    layer = MoE(MoEConfig(4, 8, RouterConfig(4, 2)), mesh)
    init_weights(layer, mesh, seed=0)
    return layer, mesh


def traces(layer: MoE) -> list[str]:
    """What differs in a layer that is watched."""
    weight = layer.router.weight_ED
    left = {
        "code": _best.__code__.co_name != "_best",
        "parameter": bool(weight._backward_hooks),
        "module": bool(layer._forward_pre_hooks),
    }
    return [name for name, there in left.items() if there]


def test_nothing_is_left_in_place_when_off_nor_between_watched_steps() -> None:
    with fake_world(2):
        layer, mesh = layer_of_two()
        code = _best.__code__
        with sanitize(layer, mesh, 0.0):
            assert traces(layer) == []
        with sanitize(layer, mesh, 0.5) as watcher:
            assert traces(layer) == ["code", "parameter", "module"]
            watcher.step()
            assert traces(layer) == []
            watcher.step()
            assert traces(layer) == ["code", "parameter", "module"]
        assert traces(layer) == [] and _best.__code__ is code


def test_an_error_in_the_job_takes_everything_away() -> None:
    with fake_world(2):
        layer, mesh = layer_of_two()
        with pytest.raises(ZeroDivisionError, match="by zero"), sanitize(layer, mesh, 1.0):
            _ = 1 / 0
        assert traces(layer) == []


def test_one_process_has_nothing_to_compare() -> None:
    mesh = MoEMesh.single()
    layer = MoE(MoEConfig(4, 8, RouterConfig(4, 2)), mesh)
    with sanitize(layer, mesh, 1.0):
        assert traces(layer) == []


def test_two_at_once_are_refused() -> None:
    with fake_world(2):
        layer, mesh = layer_of_two()
        with (
            sanitize(layer, mesh, 1.0),
            pytest.raises(ConfigError, match="another sanitizer"),
            sanitize(layer, mesh, 1.0),
        ):
            pass
        assert traces(layer) == []


@pytest.mark.parametrize("rate", ["often", "-0.1", "1.5", "nan"])
def test_a_rate_that_is_none_is_refused(rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPMD_MOE_SANITIZE", rate)
    with (
        pytest.raises(ConfigError, match=f"the rate is '{rate}'"),
        sanitize(nn.Linear(2, 2), MoEMesh.single()),
    ):
        pass


def test_the_layer_does_not_load_it() -> None:
    program = "import spmd_moe.layer.expert_load, sys; sys.exit('spmd_moe.sanitize' in sys.modules)"
    for source, loaded in ((program, 0), ("import spmd_moe.sanitize.tensor_digest; " + program, 1)):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], check=False)
        assert done.returncode == loaded


# --- hash and sketch ------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 5000, 300_000])
def test_the_hash_depends_on_every_element_and_its_place(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator).mul(50).to(dtype)
    found = int(fingerprint(x))
    assert int(fingerprint(x.clone())) == found
    assert int(fingerprint(torch.cat([x[:1], x])[1:])) == found  # wherever it lies in memory
    assert int(fingerprint(x.view(1, -1))) != found
    for place in {0, size // 2, size - 1} if size else ():
        y = x.clone()
        y[place] = ~y[place] if dtype is torch.bool else y[place] + 1
        assert int(fingerprint(y)) != found
    if size > 2 and not torch.equal(x[:1], x[-1:]):
        y = x.clone()
        y[0], y[-1] = x[-1], x[0]
        assert int(fingerprint(y)) != found


def test_the_hash_tells_rows_apart_that_are_weighted_alike() -> None:
    x = torch.arange(3 * 4096.0, dtype=torch.float64).view(3, 4096)
    assert len({int(fingerprint(x[list(order)])) for order in permutations(range(3))}) == 6


def test_two_changes_of_the_highest_bit_do_not_cancel() -> None:
    x = torch.arange(1.0, 65.0, dtype=torch.float64)
    hashes = {int(fingerprint(x))}
    for i in range(1, 64):
        y = x.clone()
        y[0], y[i] = -y[0], -y[i]
        hashes.add(int(fingerprint(y)))
    assert len(hashes) == 64


@pytest.mark.parametrize("shape", [(3,), (5, 4), (4, 7, 16), (1, 300), (0, 4), ()])
def test_the_sketch_is_linear_and_has_the_norm(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    both, apart = sketch(x + 2 * y), sketch(x) + 2 * sketch(y)
    torch.testing.assert_close(both[:COLUMNS], apart[:COLUMNS], rtol=1e-4, atol=1e-4)
    assert float(sketch(x)[COLUMNS]) == pytest.approx(float(x.square().sum()))


def compiled() -> tuple[str, float]:
    """Inside a compiled graph no function is entered; around it, and in gradients, all is seen."""
    job = Job("tp too", 1, tp=2, dp=1)
    plain = Job("", 0, tp=2, dp=1)
    difference = 0.0
    try:
        with sanitize(job.model, job.mesh, 1.0):
            router = job.model.moe.router
            job.model.moe.router = torch.compile(router, backend="eager")  # type: ignore[assignment]  # as it is
            for job.step in range(2):
                job.train()
                plain.train()
                weights = zip(job.model.parameters(), plain.model.parameters(), strict=True)
                difference = max(float((a - b).detach().abs().max()) for a, b in weights)
    except Exception as error:
        return str(error), difference
    return "", difference


@pytest.mark.gloo
@pytest.mark.filterwarnings(OF_DYNAMO)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo asks any input
def test_a_compiled_part_runs_as_it_is() -> None:
    for text, difference in run(2, compiled):
        assert "2 times the sum" in text and difference == 0.0
