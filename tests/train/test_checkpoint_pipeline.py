"""Stages of a pipeline in one checkpoint, and the whole model out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from spmd_moe import (
    CheckpointError,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    init_weights,
    load_checkpoint,
    save_checkpoint,
)
from tests.support.workers import run


class Stage(nn.Module):
    """Some blocks of a model, under the names that they have in the whole."""

    def __init__(self, mesh: MoEMesh, blocks: list[int], dim: int = 4) -> None:
        super().__init__()
        layers = {str(n): MoE(MoEConfig(dim, 8, RouterConfig(2, 1)), mesh) for n in blocks}
        self.blocks = nn.ModuleDict(layers)


def made(mesh: MoEMesh, blocks: list[int], seed: int) -> tuple[Stage, torch.optim.Optimizer]:
    """Initial values and a state that depend on the name alone."""
    model = Stage(mesh, blocks)
    init_weights(model, mesh, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + seed))
    for number, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * (1 + seed) * len(number))
    optimizer.step()
    return model, optimizer


def stages() -> tuple[MoEMesh, ProcessGroup, int]:
    """Two stages of two ranks each: the mesh of this one, the pipeline, and the stage's number."""
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    expert = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipe", "ep"))
    mesh = MoEMesh.from_device_mesh(dense["dp"], dp="dp", expert=expert["ep"], ep="ep")
    return mesh, dense.get_group("pp"), dense.get_local_rank("pp")


def differs(a: nn.Module, b: nn.Module) -> list[str]:
    pairs = zip(a.named_parameters(), b.parameters(), strict=True)
    return [name for (name, x), y in pairs if not torch.equal(x, y)]


def there_and_back(folder: str) -> list[str]:
    mesh, pipeline, number = stages()
    model, optimizer = made(mesh, [number], 0)
    save_checkpoint(f"{folder}/1", model, mesh, optimizer, {"step": 1}, pipeline=pipeline)
    other, its = made(mesh, [number], 1)
    assert load_checkpoint(f"{folder}/1", other, mesh, its, pipeline=pipeline) == {"step": 1}
    assert its.param_groups[0]["lr"] == 0.01
    return differs(model, other)


@pytest.mark.gloo
def test_stages_are_one_model(tmp_path: Path) -> None:
    assert run(4, there_and_back, str(tmp_path)) == [[]] * 4
    mesh = MoEMesh.single()
    want, its = made(mesh, [0, 1], 0)
    model, optimizer = made(mesh, [0, 1], 1)
    load_checkpoint(tmp_path / "1", model, mesh, optimizer)
    assert differs(want, model) == [] and optimizer.param_groups[0]["lr"] == 0.01
    for ours, theirs in zip(model.parameters(), want.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], its.state[theirs]["exp_avg"])
    with pytest.raises(CheckpointError, match=r"has 'blocks.1\..*which the model does not have"):
        load_checkpoint(tmp_path / "1", made(mesh, [0], 0)[0], mesh)


def of_one_name(folder: str) -> tuple[str, list[str]]:
    """Both stages call their block 0: refused, and with a prefix not."""
    mesh, pipeline, number = stages()
    model, optimizer = made(mesh, [0], number)
    told = ""
    try:
        save_checkpoint(f"{folder}/1", model, mesh, optimizer, pipeline=pipeline)
    except CheckpointError as error:
        told = str(error)
    dist.barrier()
    prefix = f"stage{number}."
    save_checkpoint(f"{folder}/2", model, mesh, optimizer, pipeline=pipeline, prefix=prefix)
    other, its = made(mesh, [0], 5)
    load_checkpoint(f"{folder}/2", other, mesh, its, pipeline=pipeline, prefix=prefix)
    assert its.param_groups[0]["lr"] == 0.01 * (1 + number)
    return told, differs(model, other)


@pytest.mark.gloo
def test_stages_with_the_same_names(tmp_path: Path) -> None:
    for told, differing in run(4, of_one_name, str(tmp_path)):
        assert "stages 0 and 1 of the pipeline both have a tensor 'blocks.0." in told
        assert differing == []


def of_another_model(folder: str) -> str:
    """One stage asks for what is not there; all ranks are told, and none waits."""
    mesh, pipeline, number = stages()
    save_checkpoint(f"{folder}/1", Stage(mesh, [number]), mesh, pipeline=pipeline)
    try:
        load_checkpoint(f"{folder}/1", Stage(mesh, [number], 4 + number), mesh, pipeline=pipeline)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_what_is_wrong_with_one_stage_all_are_told(tmp_path: Path) -> None:
    for told in run(4, of_another_model, str(tmp_path)):
        assert "load_checkpoint: '1' has 'blocks.1." in told and "the model as" in told
