"""Random numbers after a resume: those of an uninterrupted run; on another layout, of the place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmd_moe import (
    CP,
    DP,
    TP,
    MoE,
    MoEConfig,
    MoEMesh,
    Placement,
    R,
    RouterConfig,
    declare_placements,
    init_weights,
    load_checkpoint,
    reduce_gradients,
    save_checkpoint,
)
from tests.support.workers import run


class Noisy(nn.Module):
    """Dropout before a layer whose router has jitter."""

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)
        self.moe = MoE(MoEConfig(8, 8, RouterConfig(4, 2, jitter=0.2)), mesh)
        declare_placements(self, {"linear.*": Placement((DP[R], CP[R], TP[R]))})

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.moe(self.dropout(self.linear(x_TD))).hidden
        return x_TD + y_TD


Run = tuple[Noisy, MoEMesh, torch.optim.Optimizer]


def start(mesh: MoEMesh) -> Run:
    model = Noisy(mesh)
    init_weights(model, mesh, seed=0)
    return model, mesh, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: Noisy, mesh: MoEMesh, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 8)).square().sum().backward()
        reduce_gradients(model, mesh)
        optimizer.step()


def after(run_: Run) -> list[Tensor]:
    return [p.detach().clone() for p in run_[0].parameters()]


def resumed(folder: str, ranks: int, asynchronous: bool) -> list[Tensor]:
    """The differences between a run of four steps, and one that was saved after two and resumed."""
    mesh = MoEMesh.init("cpu", dp=ranks, ep=ranks) if ranks > 1 else MoEMesh.single()
    torch.manual_seed(7 + mesh[DP].rank)
    straight = start(mesh)
    train(*straight, 2)
    saving = save_checkpoint(f"{folder}/2", *straight, asynchronous=asynchronous)
    train(*straight, 2)
    saving.result()
    torch.manual_seed(1000)
    again = start(mesh)
    load_checkpoint(f"{folder}/2", *again)
    train(*again, 2)
    pairs = zip(after(again), after(straight), strict=True)
    return [a - b for a, b in pairs if not torch.equal(a, b)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_dropout_and_jitter_go_on_to_the_bit(asynchronous: bool, tmp_path: Path) -> None:
    assert resumed(str(tmp_path), 1, asynchronous) == []


@pytest.mark.gloo
def test_on_every_rank(tmp_path: Path) -> None:
    assert run(2, resumed, str(tmp_path), 2, False) == [[], []]


def drawn(folder: str, dp: int, tp: int) -> list[list[float]]:
    """What the first numbers are after each of two loads."""
    mesh = MoEMesh.init("cpu", dp=dp, tp=tp)
    run_, numbers = start(mesh), []
    for seed in (1, 2):
        torch.manual_seed(seed + dist.get_rank())
        load_checkpoint(f"{folder}/1", *run_)
        numbers.append(torch.rand(3).tolist())
    return numbers


@pytest.mark.gloo
def test_on_another_layout_they_are_of_the_place(tmp_path: Path) -> None:
    mesh = MoEMesh.single()
    run_ = start(mesh)
    torch.manual_seed(5)
    save_checkpoint(tmp_path / "1", *run_)
    next_here = torch.rand(3).tolist()
    (a, again), (b, _) = run(2, drawn, str(tmp_path), 2, 1)
    assert a == again and a != b and next_here not in (a, b)
    (c, _), (d, _) = run(2, drawn, str(tmp_path), 1, 2)
    assert c == d == a, "ranks that differ on tp alone draw alike"


def test_weights_alone_leave_the_generators(tmp_path: Path) -> None:
    mesh = MoEMesh.single()
    model, _, optimizer = start(mesh)
    save_checkpoint(tmp_path / "1", model, mesh, optimizer)
    torch.manual_seed(3)
    load_checkpoint(tmp_path / "1", model, mesh)
    numbers = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(numbers, torch.rand(3))
