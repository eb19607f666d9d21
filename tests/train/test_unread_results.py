"""Collectives whose result nothing reads: torch keeps each of them until it is waited for."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import _get_work_registry_size

from spmd_moe import (
    TP,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    P,
    R,
    RouterConfig,
    S,
    SharedConfig,
    init_weights,
    recompute,
    redistribute,
)
from spmd_moe.core.collectives import exchange
from spmd_moe.core.placement import Kind
from tests.support.workers import run


@dataclass(frozen=True)
class Config:
    """How tokens lie on tp outside of the layer, and what its backward computes again."""

    outside: Kind
    exchanges: bool | None  # of recompute; None: nothing is computed again

    def __str__(self) -> str:
        return (
            f"{self.outside}-{ {None: 'kept', False: 'recomputed', True: 'all'}[self.exchanges] }"
        )


CONFIGS = [Config(outside, how) for outside in (I, S(0)) for how in (None, False, True)]


def layer_of(config: Config, dim: int) -> MoE:
    mesh = MoEMesh.init("cpu", tp=2, ep=2)
    shared = SharedConfig(8, sharded=True)  # without a gate, which would read it
    layer = MoE(
        MoEConfig(
            dim, 8, RouterConfig(4, 2), shared=shared, src=config.outside, dst=config.outside
        ),
        mesh,
    )
    init_weights(layer, mesh, seed=0)
    if config.exchanges is not None:
        recompute([layer], exchanges=config.exchanges)
    return layer


def step(layer: nn.Module, rows: int, dim: int) -> None:
    x = torch.randn(rows, dim, requires_grad=True)
    layer(x).hidden.square().sum().backward()
    layer.zero_grad()


def unwaited(config: Config, steps: int) -> int:
    layer, before = layer_of(config, 8), _get_work_registry_size()
    for _ in range(steps):
        step(layer, 6, 8)
    return _get_work_registry_size() - before


@pytest.mark.gloo
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_collective_of_a_step_stays_behind(config: Config) -> None:
    assert run(2, unwaited, config, 3) == [0, 0]


def dropped() -> list[int]:
    """What is left of unread results, of views of them, and of one that is read."""
    mesh = MoEMesh.init("cpu", tp=2)
    x, before, left = torch.ones(4, 2), _get_work_registry_size(), []
    redistribute(x, mesh[TP], src=P, dst=R)
    left.append(_get_work_registry_size() - before)
    exchange(x, mesh[TP].group, receives=[2, 2], sends=[2, 2])
    left.append(_get_work_registry_size() - before)
    view = redistribute(x, mesh[TP], src=P, dst=R).view(8)
    left.append(_get_work_registry_size() - before)  # in flight: the view can still be read
    assert float(view.sum()) == 16.0
    left.append(_get_work_registry_size() - before)
    part = redistribute(x, mesh[TP], src=P, dst=R).split(2)[0]
    del part, view
    left.append(_get_work_registry_size() - before)
    return left


@pytest.mark.gloo
def test_results_that_nothing_reads() -> None:
    assert run(2, dropped) == [[0, 0, 1, 0, 0]] * 2


def measured(config: Config, steps: int) -> tuple[list[float], list[int], int]:
    """MB and open files after a quarter of the steps and at the end; works that are left."""
    layer, before = layer_of(config, 128), _get_work_registry_size()
    memory, files = [], []
    for number in range(1, steps + 1):
        step(layer, 512, 128)
        if number in (steps // 4, steps):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append(pages * resource.getpagesize() / 1e6)
            files.append(len(os.listdir("/proc/self/fd")))
    return memory, files, _get_work_registry_size() - before


@pytest.mark.long
@pytest.mark.gloo
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_two_thousand_steps_in_the_same_memory(config: Config) -> None:
    """A result of 512 rows that stayed at each step would be 400 MB."""
    for memory, files, works in run(2, measured, config, 2000, timeout=3600):
        assert works == 0 and files[0] == files[1] and memory[1] - memory[0] < 15.0, memory
