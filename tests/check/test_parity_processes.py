"""Modules that cannot run as threads of one process run as gloo processes."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from spmd_moe.check import Case, MeshSizes, run_parity
from spmd_moe.check.parity.report import ParityReport
from spmd_moe.check.target import CannotCheckError

pytestmark = pytest.mark.slow  # each process imports torch
TP2 = MeshSizes((("dp", 1), ("tp", 2)))
_RANK = 0  # as frameworks keep theirs


class Swap(torch.autograd.Function):
    """Adds up two ranks by sending and receiving, which torch's group for threads has not."""

    @staticmethod
    def forward(ctx: object, x: Tensor, wrong: bool) -> Tensor:
        other = 1 - dist.get_rank()
        got = torch.empty_like(x)
        sent, received = dist.isend(x.contiguous(), other), dist.irecv(got, other)
        assert sent is not None and received is not None
        sent.wait()
        received.wait()
        return x if wrong else x + got

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


swapped: Any = Swap.apply


class Row(nn.Module):
    """The input's columns are sharded: by the caller, or by a variable of this module."""

    def __init__(self, mesh: DeviceMesh, way: str) -> None:
        super().__init__()
        global _RANK
        self.ranks, self.way, _RANK = mesh["tp"].size(), way, mesh["tp"].get_local_rank()
        self.group = mesh.get_group("tp")
        self.weight = nn.Parameter(torch.randn(8 // self.ranks, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return x @ self.weight
        if self.way == "global":
            y = x.chunk(2, 1)[_RANK] @ self.weight
            return y
        if self.way == "raises":
            raise ValueError("on a rank")
        sent: Tensor = swapped(x @ self.weight, self.way == "wrong")
        return sent


def target(mesh: DeviceMesh, *, way: str = "right") -> Case:
    words, out = ("tp R", "tp P") if way == "global" else ("tp 1", "")
    return Case(Row(mesh, way), (torch.randn(6, 8),), (words,), out=out, weights={"weight": "tp 0"})


def run(way: str, ranks: str = "auto") -> ParityReport:
    return run_parity(partial(target, way=way), layouts=[TP2], ranks=ranks, steps=1)


def test_sends_and_receives_run_in_processes() -> None:
    report = run("right")
    assert report.status == 0 and report.compared > 3
    # The first rank that raises ends the run; the other may have raised by then.
    said = r"ranks run as gloo processes: as threads, on ranks? [01, ]+ it raises"
    assert re.search(said, str(report))
    wrong = run("wrong", "processes")
    [finding] = wrong.findings()
    assert wrong.status == 1 and "summed over tp it is right" in finding


def test_state_that_threads_share_is_no_finding() -> None:
    report = run("global")
    said = "ranks run as gloo processes: threads share tests.check.test_parity_processes._RANK."
    assert report.status == 0 and said in str(report)
    assert run("global", "threads").status == 1  # what it would be without processes


def test_what_processes_cannot_do_either() -> None:
    report = run("raises")
    assert report.status == 2
    assert "In gloo processes: on ranks 0, 1 it raises ValueError: on a rank" in str(report)


def test_a_target_that_cannot_be_sent() -> None:
    def local(mesh: DeviceMesh) -> Case:
        return target(mesh)

    report = run_parity(local, layouts=[TP2], steps=1)
    assert report.status == 2 and not report.findings()
    assert "In gloo processes: pickle raises" in str(report)
    with pytest.raises(CannotCheckError, match="ranks is 'gloo'"):
        run("right", "gloo")


def test_a_rank_that_hangs_in_its_process() -> None:
    report = run_parity(hanging, layouts=[TP2], ranks="processes", steps=1, seconds=4.0)
    assert report.status == 2
    said = "ranks [0, 1] wait for each other without end at tests/check/test_parity_processes.py"
    assert said in str(report)


def hanging(mesh: DeviceMesh) -> Case:
    def call(x: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            time.sleep(1000)
        return x

    return Case(nn.Linear(4, 4), (torch.randn(4, 4),), ("",), call=call)
