"""A training step on a pretended device: where the host waits, as exact numbers."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spmd_moe import (
    TP,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    S,
    balance_loss,
    clip_grad_norm_,
    expert_load,
    init_weights,
    load_checkpoint,
    reduce_gradients,
    reduce_loss_terms,
    sanitize,
    save_checkpoint,
    update_selection_bias,
    z_loss,
)
from tests.support.pretended_device import Log, on_device, pretended_device, to_device
from tests.support.workers import run

CONFIG = MoEConfig(64, 32, RouterConfig(8, top_k=2, bias=True), bias=True, balance="batch")
RANKS = {"dp": 2, "tp": 2, "ep": 4}


class Job:
    """A layer on the device, its optimizer, and the waits of each part of a step."""

    def __init__(self, mesh: MoEMesh, log: Log) -> None:
        kind = I if mesh[TP].size > 1 else S(0)
        self.mesh, self.log = mesh, log
        self.layer = MoE(replace(CONFIG, src=kind, dst=kind), mesh)
        init_weights(self.layer, mesh, seed=0)
        to_device(self.layer.to(torch.bfloat16))
        self.optimizer = torch.optim.AdamW(self.layer.parameters())

    def step(self) -> dict[str, list[str]]:
        """The parts of a step that wait, with what waits."""
        layer, mesh, log, waits = self.layer, self.mesh, self.log, dict[str, list[str]]()
        x = on_device(torch.randn(6, 64).to(torch.bfloat16))
        out = layer(x)
        waits["forward"] = log.take()
        assert out.losses is not None
        total = reduce_loss_terms(out.losses, mesh)
        extra = balance_loss(out.losses, total, mesh) + z_loss(out.losses, total)
        loss = out.hidden.float().sum() + extra
        waits["losses"] = log.take()
        torch.autograd.backward(loss)
        waits["backward"] = log.take()
        reduce_gradients(layer, mesh)
        waits["reduce"] = log.take()
        clip_grad_norm_(layer, mesh, 1.0)
        waits["clip"] = log.take()
        self.optimizer.step()
        self.optimizer.zero_grad()
        waits["optimizer"] = log.take()
        expert_load(out, mesh)
        update_selection_bias([layer.router], mesh, 0.01)
        waits["counters"] = log.take()
        return {part: found for part, found in waits.items() if found}


def two_steps(degrees: dict[str, int]) -> list[dict[str, list[str]]]:
    mesh = MoEMesh.init("cpu", **degrees) if degrees else MoEMesh.single()
    with pretended_device() as log:
        job = Job(mesh, log)
        return [job.step(), job.step()]


def test_a_step_of_one_process_never_waits() -> None:
    assert two_steps({}) == [{}, {}]


@pytest.mark.gloo
def test_a_step_of_ranks_waits_once_for_its_exchange() -> None:
    for steps in run(4, two_steps, RANKS):
        for waits in steps:
            assert list(waits) == ["forward"] and len(waits["forward"]) == 1, waits
            assert "layer/dispatch/" in waits["forward"][0]


def watched_steps() -> list[dict[str, list[str]]]:
    with pretended_device() as log:
        job = Job(MoEMesh.single(), log)
        with sanitize(job.layer, job.mesh, rate=1.0):
            return [job.step(), job.step()]


def test_the_sanitizer_of_one_process_has_nothing_to_compare() -> None:
    assert watched_steps() == [{}, {}]


def saved_and_loaded(degrees: dict[str, int], folder: str) -> list[tuple[int, int, int]]:
    """Tensors of the device that this rank has, its reads for saving, its uploads for loading."""
    mesh = MoEMesh.init("cpu", **degrees) if degrees else MoEMesh.single()
    with pretended_device() as log:
        job, found = Job(mesh, log), []
        job.step()
        for asynchronous in (False, True):
            path, optimizer = Path(folder) / str(asynchronous), job.optimizer
            log.take()
            saving = save_checkpoint(path, job.layer, mesh, optimizer, asynchronous=asynchronous)
            saving.result()
            kinds = Counter(wait.partition(" ")[0] for wait in log.take())
            load_checkpoint(path, job.layer, mesh, optimizer)
            loads = Counter(wait.partition(" ")[0] for wait in log.take())
            # Two moments of each parameter; the buffers are the selection bias and its counts.
            tensors = 3 * len(list(job.layer.parameters())) + 2
            assert set(kinds) <= {"read"} and set(loads) <= {"upload"}
            found.append((tensors, kinds["read"], loads["upload"]))
        return found


def test_a_checkpoint_reads_each_tensor_once() -> None:
    folder = tempfile.mkdtemp()
    try:
        for tensors, reads, uploads in saved_and_loaded({}, folder):
            assert reads == uploads == tensors
    finally:
        shutil.rmtree(folder)
