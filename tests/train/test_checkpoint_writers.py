"""Jobs that save under one name, jobs that were killed, and what is offered for a resume."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from spmd_moe import (
    CheckpointError,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    init_weights,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from spmd_moe.train.checkpoint import on_disk

MESH = MoEMesh.single()
JOBS, PATHS = 3, 20


def made(seed: int) -> MoE:
    layer = MoE(MoEConfig(16, 16, RouterConfig(4, 2)), MESH)
    init_weights(layer, MESH, seed=seed)
    return layer


def equal(a: MoE, b: MoE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def save_all(folder: str, job: int, start: Any, told: Any) -> None:
    """What became of each save, in words."""
    layer, said = made(job), []
    start.wait()
    for number in range(PATHS):
        try:
            save_checkpoint(Path(folder) / f"{number:03}", layer, MESH, extra={"job": job})
            said.append("saved")
        except CheckpointError as error:
            said.append(str(error).partition("\n")[0])
    told.put((job, said))


def test_of_three_jobs_one_gets_each_name(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(JOBS), context.Queue()
    jobs = [
        context.Process(target=save_all, args=(str(tmp_path), job, start, told), daemon=True)
        for job in range(JOBS)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads
        for process in jobs:
            process.start()
    said = dict(told.get(timeout=200) for _ in jobs)
    for process in jobs:
        process.join()
    for number in range(PATHS):
        outcomes = {job: said[job][number] for job in said}
        (winner,) = [job for job, text in outcomes.items() if text == "saved"]
        others = {text for job, text in outcomes.items() if job != winner}
        assert others == {f"save_checkpoint: '{number:03}' exists."}
        loaded = made(9)
        assert load_checkpoint(tmp_path / f"{number:03}", loaded, MESH) == {"job": winner}
        assert equal(loaded, made(winner))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n:03}" for n in range(PATHS)]


def while_writing(path: Path, act: Callable[[], object]) -> None:
    """Save, and do something when all data is written and nothing is claimed."""
    real, done = on_disk._folder_to_disk, list[int]()

    def then(folder: Path) -> None:
        if not done:
            done.append(1)
            act()
        real(folder)

    with patch.object(on_disk, "_folder_to_disk", then):
        save_checkpoint(path, made(0), MESH)
    assert done


def test_a_resume_during_a_save_sees_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "1", made(1), MESH)

    def resume() -> None:
        assert latest_checkpoint(tmp_path) == tmp_path / "1"
        with pytest.raises(CheckpointError, match="'2' is not there"):
            load_checkpoint(tmp_path / "2", made(2), MESH)

    while_writing(tmp_path / "2", resume)
    assert latest_checkpoint(tmp_path) == tmp_path / "2"


def test_the_later_of_two_saves_is_told(tmp_path: Path) -> None:
    """The first to finish has the name, and takes away what the other has written."""
    with pytest.raises(CheckpointError, match="'1' exists"):
        while_writing(tmp_path / "1", lambda: save_checkpoint(tmp_path / "1", made(1), MESH))
    loaded = made(2)
    load_checkpoint(tmp_path / "1", loaded, MESH)
    assert equal(loaded, made(1)) and os.listdir(tmp_path) == ["1"]


def test_what_killed_jobs_leave_is_in_nobodys_way(tmp_path: Path) -> None:
    for left in ("1.0123456789abcdef.part", "1.fedcba9876543210.part", "2.0123456789abcdef.part"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rank0.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path / "1", made(1), MESH)
    assert sorted(os.listdir(tmp_path)) == ["1", "2.0123456789abcdef.part"]
    assert latest_checkpoint(tmp_path) == tmp_path / "1"


@pytest.mark.parametrize("name", ["index.json", "rank0.safetensors"])
def test_the_latest_is_one_that_loads(name: str, tmp_path: Path) -> None:
    for number in (1, 2):
        save_checkpoint(tmp_path / f"{number}", made(number), MESH)
    data = tmp_path / "2" / name
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="latest_checkpoint: skipped '2' is damaged"):
        assert latest_checkpoint(tmp_path) == tmp_path / "1"


@pytest.mark.parametrize("name", ["a\0b", "..", "tab\t", "\udcff", "x.part", "a" * 300])
def test_names_that_no_folder_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path / name, made(0), MESH)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / name, made(0), MESH)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["step 1", "*?[x]", "-rf", "caf\u00e9", "con'; rm"])
def test_odd_names(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / name, made(0), MESH)
    assert latest_checkpoint(tmp_path) == tmp_path / name
    load_checkpoint(tmp_path / name, made(1), MESH)
