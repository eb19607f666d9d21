"""What checkpoints are refused for: the cases of `test_errors.py` that need files."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import nn

from spmd_moe import MoEMesh, declare_placements, load_checkpoint, save_checkpoint
from spmd_moe.core.placement import SharedWeight
from spmd_moe.train.checkpoint import files
from tests.support.simulated_ranks import fake_world

Optimizer = torch.optim.Optimizer


def model(rows: int = 3, dtype: torch.dtype = torch.float32, *, bias: bool = False) -> nn.Module:
    linear = nn.Linear(4, rows, bias=bias, dtype=dtype)
    declare_placements(linear, {"*": SharedWeight})
    return linear


def saved(folder: Path, optimizer: Callable[[nn.Module], Optimizer] | None = None) -> Path:
    this = model()
    save_checkpoint(
        folder / "1", this, MoEMesh.single(), None if optimizer is None else optimizer(this)
    )
    return folder / "1"


def loading(spoil: Callable[[Path], object], *, name: str = "1") -> Callable[[], object]:
    """Load a good checkpoint after something was done to it."""

    def act() -> object:
        with TemporaryDirectory() as folder:
            spoil(saved(Path(folder)))
            return load_checkpoint(Path(folder) / name, model(), MoEMesh.single())

    return act


def into(other: nn.Module) -> Callable[[], object]:
    def act() -> object:
        with TemporaryDirectory() as folder:
            return load_checkpoint(saved(Path(folder)), other, MoEMesh.single())

    return act


def spoiled_data(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        data = path / "rank0.safetensors"
        data.write_bytes(change(data.read_bytes()))

    return spoil


def spoiled_index(**changes: object) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        index = json.loads((path / "index.json").read_bytes())
        (path / "index.json").write_text(json.dumps(index | changes))

    return spoil


def contradicted(path: Path) -> None:
    index = json.loads((path / "index.json").read_bytes())
    index["tensors"]["weight"]["chunks"][0]["bytes"] += 1
    (path / "index.json").write_text(json.dumps(index))


def over_another() -> None:
    with TemporaryDirectory() as folder:
        saved(Path(folder))
        saved(Path(folder))


def other_groups() -> None:
    with TemporaryDirectory() as folder:
        this, mesh = model(bias=True), MoEMesh.single()
        save_checkpoint(Path(folder) / "1", this, mesh, adam(this))
        optimizer = torch.optim.Adam([{"params": [p]} for p in this.parameters()])
        load_checkpoint(Path(folder) / "1", this, mesh, optimizer)


def adam(this: nn.Module) -> Optimizer:
    return torch.optim.Adam(this.parameters())


def odd_state(this: nn.Module) -> Optimizer:
    optimizer = adam(this)
    optimizer.state[next(this.parameters())]["factor"] = torch.ones(2)
    return optimizer


def odd_setting(this: nn.Module) -> Optimizer:
    optimizer = adam(this)
    optimizer.param_groups[0]["schedule"] = torch.ones(2)
    return optimizer


def named(name: str = "1", **extra: object) -> Callable[[], object]:
    """A save under a name that nothing has, or with something that cannot be stored."""

    def act() -> object:
        with TemporaryDirectory() as folder:
            return save_checkpoint(Path(folder) / name, model(), MoEMesh.single(), extra=extra)

    return act


def of_part_of_the_ranks(act: Callable[..., object]) -> Callable[[], object]:
    def on_two() -> None:
        with fake_world(2):
            act("1", model(), MoEMesh.single())

    return on_two


def no_room() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with TemporaryDirectory() as folder, patch.object(files, "_to_disk", side_effect=full):
        saved(Path(folder))


def with_optimizer(optimizer: Callable[[nn.Module], Optimizer]) -> Callable[[], object]:
    def act() -> object:
        with TemporaryDirectory() as folder:
            return saved(Path(folder), optimizer)

    return act


BAD_CHECKPOINTS: dict[str, Callable[[], object]] = {
    "checkpoint_exists": over_another,
    "checkpoint_no_room": no_room,
    "checkpoint_not_there": loading(lambda path: None, name="2"),
    "checkpoint_no_index": loading(lambda path: (path / "index.json").unlink()),
    "checkpoint_index_cut": loading(lambda path: (path / "index.json").write_text("{")),
    "checkpoint_index_contradicts": loading(contradicted),
    "checkpoint_other_version": loading(spoiled_index(version=2)),
    "checkpoint_cut": loading(spoiled_data(lambda data: data[:-1])),
    "checkpoint_other_bytes": loading(spoiled_data(lambda data: data[:-1] + b"?")),
    "checkpoint_other_names": into(model(bias=True)),
    "checkpoint_other_shape": into(model(5)),
    "checkpoint_other_dtype": into(model(dtype=torch.bfloat16)),
    "checkpoint_other_groups": other_groups,
    "checkpoint_foreign_parameter": with_optimizer(lambda this: adam(model())),
    "checkpoint_odd_state": with_optimizer(odd_state),
    "checkpoint_odd_setting": with_optimizer(odd_setting),
    "checkpoint_odd_extra": named(step=torch.ones(2)),
    "checkpoint_extra_keys": named(steps={1: 2}),
    "checkpoint_extra_tuple": named(sizes=[(2, 3)]),
    "checkpoint_unfinished_name": named("last.part"),
    "checkpoint_part_of_the_ranks": of_part_of_the_ranks(save_checkpoint),
    "checkpoint_load_part_of_the_ranks": of_part_of_the_ranks(load_checkpoint),
    "checkpoint_no_mesh": lambda: save_checkpoint("1", model(), None),  # type: ignore[arg-type]  # wrong on purpose
}
