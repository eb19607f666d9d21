"""Checkpoints: saved on one layout and loaded on another, bit for bit; and what may go wrong."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from spmd_moe import (
    DP,
    CheckpointError,
    MoEMesh,
    declare_placements,
    latest_checkpoint,
    load_checkpoint,
    obligations,
    reduce_gradients,
    save_checkpoint,
    update_selection_bias,
)
from spmd_moe.core.placement import P, SharedWeight
from spmd_moe.layer.router import Router
from spmd_moe.train.checkpoint import on_disk
from spmd_moe.train.checkpoint.rank_parts import awaited_state
from spmd_moe.train.obligations import Obligation
from tests.support.layer_layouts import Layout
from tests.support.models import Model, batch, part
from tests.support.workers import WorkersError, run
from tests.train.test_parallelize import Way, held, on_ranks

ALONE = Way(Layout(), own_tokens=True)
WAYS = [
    Way(Layout(dp=4), own_tokens=True),
    Way(Layout(dp=4, tp=2, ep=2, etp=2), own_tokens=True),
    Way(Layout(dp=4, tp=2, ep=2, etp=2), own_tokens=True, replicas=2),
    Way(Layout(dp=4, tp=2, ep=2, etp=2), own_tokens=True, fsdp=False),
    Way(Layout(dp=2, tp=2, ep=4), own_tokens=True),
    Way(Layout(dp=2, cp=2, ep=4), own_tokens=True, fsdp=False),
    Way(Layout(dp=8, ep=8), own_tokens=True),
    Way(Layout(tp=8, ep=4, etp=2), own_tokens=True, fsdp=False),
    Way(Layout(dp=8, ep=2), own_tokens=True),  # four experts on each rank, for four shards
]


def start(way: Way) -> tuple[Model, MoEMesh, torch.optim.Optimizer]:
    model, mesh = on_ranks(way)
    groups: list[dict[str, Any]] = [
        {"params": list(model.blocks.parameters()), "lr": 0.02, "betas": (0.8, 0.9)},
        {"params": [*model.embedding.parameters(), *model.head.parameters()]},
    ]
    return model, mesh, torch.optim.AdamW(groups, lr=0.01, fused=True)


def train(model: Model, mesh: MoEMesh, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(*batch(mesh, True, step)).backward()
        if not isinstance(model.head.weight, DTensor):
            reduce_gradients(model, mesh)
        optimizer.step()
        if step % 2:
            routers = [module for module in model.modules() if isinstance(module, Router)]
            update_selection_bias(routers, mesh, 0.01)


def everything(model: Model, mesh: MoEMesh, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of this process by name, with the counters of all ranks summed."""
    found: dict[str, Tensor] = {}
    for row in obligations(model, mesh):
        tensor = model.get_buffer(row.name) if row.is_buffer else model.get_parameter(row.name)
        found[row.name] = tensor
        for key, value in optimizer.state.get(tensor, {}).items():
            found[f"{row.name}:{key}"] = value
    return {name: t.detach().clone() for name, t in found.items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, t in ours.items()
        if not torch.equal(t, theirs[name]) or t.dtype is not theirs[name].dtype
    ]


def trained_alone() -> tuple[Model, MoEMesh, torch.optim.Optimizer]:
    """After three steps: the counters of the last one are not used yet."""
    run_ = start(ALONE)
    train(*run_, range(3))
    counters = [b for name, b in run_[0].named_buffers() if name.endswith("seen_E")]
    assert all(int(counter.sum()) > 0 for counter in counters)
    return run_


def through(way: Way, there: str, back: str, whole: dict[str, Tensor]) -> list[str]:
    """Load, compare each part with the whole, save; the names of what differs."""
    model, mesh, optimizer = start(way)
    train(model, mesh, optimizer, range(1))  # a state that has to go
    assert load_checkpoint(there, model, mesh, optimizer) == {"step": 3}
    wrong = []
    rows = {row.name: row for row in obligations(model, mesh)}
    for name, tensor in everything(model, mesh, optimizer).items():
        row = rows[name.partition(":")[0]]
        if not _is_part(tensor, whole[name], row, mesh):
            wrong.append(name)
    save_checkpoint(back, model, mesh, optimizer, {"step": 3})
    return wrong


def _is_part(tensor: Tensor, whole: Tensor, row: Obligation, mesh: MoEMesh) -> bool:
    if row.placement[next(iter(row.placement)).role] is P:
        total = tensor.clone()
        dist.all_reduce(total)
        return torch.equal(total, whole)
    if whole.ndim == 0:
        return torch.equal(tensor, whole)
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return torch.equal(mine, held(tensor, part(whole, row.placement, mesh)))


@pytest.mark.gloo
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_there_and_back_on_another_layout(way: Way, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    model, mesh, optimizer = trained_alone()
    save_checkpoint(there, model, mesh, optimizer, {"step": 3})
    whole = everything(model, mesh, optimizer)
    assert len(whole) > 80 and "blocks.0.moe.experts.w1_eFD:exp_avg_sq" in whole
    for wrong in run(way.layout.world, through, way, str(there), str(back), whole):
        assert wrong == []
    fresh = start(ALONE)
    fresh[2].param_groups[0] |= {"lr": 5.0, "betas": (0.1, 0.1)}
    load_checkpoint(back, *fresh)
    assert equal(everything(*fresh), whole) == []
    assert fresh[2].param_groups[0]["betas"] == (0.8, 0.9)
    assert fresh[2].param_groups[0]["lr"] == 0.02


def resumed(way: Way, folder: str) -> list[str]:
    """Two steps and two more, with a checkpoint between them or without."""
    straight = start(way)
    train(*straight, range(2))
    saved = save_checkpoint(f"{folder}/2", *straight, asynchronous=True)
    train(*straight, range(2, 4))  # while it is being written
    saved.result()
    again = start(way)
    load_checkpoint(f"{folder}/2", *again)
    train(*again, range(2, 4))
    theirs, ours = everything(*straight), everything(*again)
    return [n for n in ours if not torch.equal(_local(ours[n]), _local(theirs[n]))]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.gloo
@pytest.mark.parametrize("fsdp", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(fsdp: bool, tmp_path: Path) -> None:
    way = replace(WAYS[4], fsdp=fsdp)
    assert run(4, resumed, way, str(tmp_path)) == [[]] * 4


def test_asynchronous_saves_are_of_the_moment_of_the_call(tmp_path: Path) -> None:
    run_ = trained_alone()
    whole = everything(*run_)
    go, bytes_of = threading.Event(), on_disk._bytes_of

    def later(tensor: Tensor) -> memoryview:
        assert go.wait(60)
        return bytes_of(tensor)

    with patch.object(on_disk, "_bytes_of", later):
        saves = [save_checkpoint(tmp_path / name, *run_, asynchronous=True) for name in ("1", "2")]
        train(*run_, range(3, 5))
        assert not any(save.done() for save in saves)
        go.set()
        for save in saves:
            save.result()
    for name in ("1", "2"):
        fresh = start(ALONE)
        load_checkpoint(tmp_path / name, *fresh)
        assert equal(everything(*fresh), whole) == []


def after_evaluation(way: Way, folder: str) -> list[str]:
    """A forward alone leaves FSDP's gathered parameters in the model, in the compute precision."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)

    def fresh() -> tuple[Model, MoEMesh]:
        return on_ranks(way, torch.float32, policy=policy)

    model, mesh = fresh()
    before = {name: _local(p).clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model(*batch(mesh, True))
    assert any(p.dtype is torch.bfloat16 for p in model.parameters()), "all are stored ones"
    save_checkpoint(f"{folder}/1", model, mesh)
    again, _ = fresh()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_checkpoint(f"{folder}/1", again, mesh)
    return [n for n, p in again.named_parameters() if not torch.equal(_local(p), before[n])]


@pytest.mark.gloo
def test_saved_after_an_evaluation(tmp_path: Path) -> None:
    way = replace(WAYS[4], reshard=False)
    assert run(4, after_evaluation, way, str(tmp_path)) == [[]] * 4


# --- what goes wrong while saving ---------------------------------------------------------------


def save_and_fail(way: Way, folder: str, how: str) -> str:
    """A good checkpoint, then one in which all ranks die, or rank 1 has no room."""
    model, mesh, optimizer = start(way)
    save_checkpoint(f"{folder}/1", model, mesh, optimizer)

    def fail(file: Any) -> None:
        if how == "killed":
            os._exit(9)
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train(model, mesh, optimizer, range(1))
    try:
        with patch.object(on_disk, "_to_disk", fail):
            save_checkpoint(f"{folder}/2", model, mesh, optimizer, asynchronous=True).result()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.gloo
@pytest.mark.parametrize("how", ["killed", "no room"])
def test_a_save_that_fails_leaves_the_one_before(how: str, tmp_path: Path) -> None:
    way = Way(Layout(dp=2, ep=2), own_tokens=True)
    if how == "killed":
        with pytest.raises(WorkersError, match="died with exit code 9"):
            run(2, save_and_fail, way, str(tmp_path), how)
        (left,) = tmp_path.glob("2.*.part")  # it was in the middle of a save
        assert left.is_dir()
    else:
        for said in run(2, save_and_fail, way, str(tmp_path), how):
            assert "save_checkpoint: '2', on rank 1: No space left on device" in said
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        left = tmp_path / "2.part"
    assert not (tmp_path / "2").exists()
    assert latest_checkpoint(tmp_path) == tmp_path / "1"
    fresh = start(ALONE)
    load_checkpoint(tmp_path / "1", fresh[0], fresh[1])
    with pytest.raises(CheckpointError, match=r"part' (has no index|was never|is not there)"):
        load_checkpoint(left, fresh[0], fresh[1])
    save_checkpoint(tmp_path / "2", *fresh)  # and what was left is gone
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert latest_checkpoint(tmp_path) == tmp_path / "2"
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == ["index.json", "rank0.safetensors"]


# --- what goes wrong while loading ----------------------------------------------------------------


def test_every_byte_is_watched(tmp_path: Path) -> None:
    run_ = trained_alone()
    save_checkpoint(tmp_path / "1", *run_)
    data = tmp_path / "1" / "rank0.safetensors"
    good = data.read_bytes()
    for place in (9, len(good) // 2, len(good) - 1):
        data.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match=r"other bytes for|the header of"):
            load_checkpoint(tmp_path / "1", *run_)
    data.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=r"rank0.safetensors has \d+ bytes instead of \d+"):
        load_checkpoint(tmp_path / "1", *run_)
    data.write_bytes(good)
    load_checkpoint(tmp_path / "1", *run_)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ = trained_alone()
    save_checkpoint(tmp_path / "1", *run_)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_checkpoint(tmp_path / "1", *run_)


def told(way: Way, folder: str) -> str:
    """Rank 1 looks into another folder, in which there is nothing."""
    model, mesh, _ = start(way)
    save_checkpoint(f"{folder}/1", model, mesh)
    place = folder if mesh[DP].rank == 0 else f"{folder}/elsewhere"
    try:
        load_checkpoint(f"{place}/1", model, mesh)
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_ranks_that_see_other_files_are_told(tmp_path: Path) -> None:
    for said in run(2, told, Way(Layout(dp=2), own_tokens=True), str(tmp_path)):
        assert "called with different settings" in said and "is not there" in said


def test_weights_alone(tmp_path: Path) -> None:
    run_ = trained_alone()
    save_checkpoint(tmp_path / "1", *run_, {"words": ["any", 1, None]})
    fresh = start(ALONE)
    extra = load_checkpoint(tmp_path / "1", fresh[0], fresh[1])
    assert extra == {"words": ["any", 1, None]} and not fresh[2].state
    for ours, theirs in zip(fresh[0].parameters(), run_[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_other_optimizers(kind: Any, tmp_path: Path) -> None:
    how = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def fresh() -> tuple[Model, MoEMesh, torch.optim.Optimizer]:
        model, mesh, _ = start(ALONE)
        return model, mesh, kind(model.parameters(), lr=0.01, **how)

    straight = fresh()
    train(*straight, range(2))
    save_checkpoint(tmp_path / "1", *straight)
    train(*straight, range(2, 4))
    again = fresh()
    load_checkpoint(tmp_path / "1", *again)
    train(*again, range(2, 4))
    assert equal(everything(*again), everything(*straight)) == []


def test_the_latest_is_that_of_the_highest_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "notes").mkdir()
    assert latest_checkpoint(tmp_path) is None
    empty = on_disk.encode(on_disk.Index({}, {}, None))
    for name in ("best", "epoch_2_step_5", "epoch_1_step_9", "step_900", "step_1000", "step_1001"):
        (tmp_path / name).mkdir()
        if name != "step_1001":
            (tmp_path / name / on_disk.INDEX).write_bytes(empty)
    for name in ("step_1000", "step_900", "epoch_2_step_5", "epoch_1_step_9", "best"):
        assert latest_checkpoint(tmp_path) == tmp_path / name
        (tmp_path / name / on_disk.INDEX).unlink()


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_where_the_saved_settings_want_it(fused: bool) -> None:
    """They become the optimizer's; a fused step counts on the device, where meta stands for one."""
    model = nn.Linear(2, 2, bias=False, device="meta")
    declare_placements(model, {"*": SharedWeight})
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.param_groups[0]["fused"] = not fused
    kept = {"weight": {"step": {"like_parameter": False, "dtype": "float32"}}}
    numbers = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}
    saved = [{"settings": {"fused": fused, **numbers}, "state": kept}]
    _, states, _ = awaited_state(model, MoEMesh.single(), optimizer, saved)
    (state,) = states.values()
    assert state["step"].is_meta is fused
