"""Checkpoints that are refused: the cases of `test_errors.py` that need files."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from spmd_moe import MoEMesh, declare_placements, load_checkpoint, save_checkpoint
from spmd_moe.core.placement import SharedWeight
from spmd_moe.train.checkpoint import convert as convert_module
from spmd_moe.train.checkpoint import on_disk
from spmd_moe.train.checkpoint.check_before_plan import refuse_unknown
from spmd_moe.train.checkpoint.convert import convert
from spmd_moe.train.checkpoint.planners import SaveParts
from spmd_moe.train.checkpoint.rank_parts import model_parts
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


def other_weight(path: Path) -> None:
    """A byte right behind the header of the file."""
    data = bytearray((path / "rank0.safetensors").read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    (path / "rank0.safetensors").write_bytes(data)


def with_digest(path: Path, change: Callable[[Any], object]) -> None:
    """Change the index of a checkpoint as a program that knows the format could."""
    text = (path / "index.json").read_bytes()
    document = json.loads(text)
    change(document["index"])
    body = json.dumps(document["index"]).encode()
    head = text.partition(b'"sha256": "')[0] + b'"sha256": "'
    digest = hashlib.sha256(body).hexdigest().encode()
    (path / "index.json").write_bytes(head + digest + b'", "index": ' + body + b"}")


def spoiled_index(change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda path: with_digest(path, change)


def replaced(old: bytes, new: bytes, name: str = "index.json") -> Callable[[Path], object]:
    """Without another digest."""

    def spoil(path: Path) -> None:
        text = (path / name).read_bytes()
        assert old in text
        (path / name).write_bytes(text.replace(old, new))

    return spoil


def doubled_key(path: Path) -> None:
    text = (path / "index.json").read_bytes()
    with patch.object(json, "dumps", side_effect=lambda index: '{"rest": {}, "rest": {}}'):
        with_digest(path, lambda index: None)
    assert (path / "index.json").read_bytes() != text


def moved_chunk(index: Any) -> None:
    index["tensors"]["weight"]["chunks"][0]["at"] = [1, 0]


def odd_groups() -> None:
    with TemporaryDirectory() as folder:
        path = saved(Path(folder), adam)
        with_digest(path, lambda index: index["rest"]["optimizer"][0].pop("settings"))
        this = model()
        load_checkpoint(path, this, MoEMesh.single(), adam(this))


def odd_random() -> None:
    """A state of the generator that torch refuses, under the right checksums."""
    with TemporaryDirectory() as folder:
        path = saved(Path(folder), adam)
        data = path / "rank0.safetensors"
        start = [0]

        def change(index: Any) -> None:
            chunk = index["tensors"]["random:cpu"]["chunks"][0]
            start[0] = chunk["start"]
            chunk["crc32"] = zlib.crc32(b"\xff" * 5056)

        with_digest(path, change)
        content = bytearray(data.read_bytes())
        content[start[0] : start[0] + 5056] = b"\xff" * 5056
        data.write_bytes(content)
        this = model()
        load_checkpoint(path, this, MoEMesh.single(), adam(this))


def of_two_stages() -> None:
    this = model()
    parts = model_parts(this, MoEMesh.single(), {})
    planner = SaveParts(0, None, None)
    planner.set_up_planner(parts)
    plan = planner.create_local_plan()
    planner.create_global_plan([plan, replace(plan, planner_data=(1, None))])


def unwanted() -> None:
    """What no stage of a pipeline wants."""
    refuse_unknown(Path("1"), ["blocks.7.weight"])


def too_large() -> None:
    with patch.object(on_disk, "MAX_BYTES", 10):
        loading(lambda path: None)()


def from_dcp(spoil: Callable[[Path], object]) -> Callable[[], object]:
    """A checkpoint as a DCP folder, and back after something was done to it."""

    def act() -> None:
        with TemporaryDirectory() as folder:
            convert(saved(Path(folder)), Path(folder) / "dcp")
            spoil(Path(folder) / "dcp")
            convert(Path(folder) / "dcp", Path(folder) / "2")

    return act


def other_metadata(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return spoil


def other_shape(metadata: Any) -> None:
    metadata.state_dict_metadata["weight"].chunks[0].sizes = torch.Size((3, 3))


def other_bytes(metadata: Any) -> None:
    places = metadata.storage_data
    weight = next(p for p in places if p.fqn == "weight")
    places[weight] = next(info for place, info in places.items() if place.fqn == "random:cpu")


def spoiled_dcp_data(path: Path) -> None:
    (data,) = path.glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))


def large_metadata() -> None:
    with patch.object(convert_module, "MAX_BYTES", 10):
        from_dcp(lambda path: None)()


def over_another() -> None:
    with TemporaryDirectory() as folder:
        saved(Path(folder))
        saved(Path(folder))


def other_groups() -> None:
    """Two groups with rates of their own, for an optimizer that has one."""
    with TemporaryDirectory() as folder:
        this, mesh = model(bias=True), MoEMesh.single()
        groups = [{"params": [p], "lr": 0.1 * n} for n, p in enumerate(this.parameters())]
        save_checkpoint(Path(folder) / "1", this, mesh, torch.optim.Adam(groups))
        load_checkpoint(Path(folder) / "1", this, mesh, adam(this))


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
    with TemporaryDirectory() as folder, patch.object(on_disk, "_to_disk", side_effect=full):
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
    "checkpoint_index_changed": loading(replaced(b'"F32"', b'"I32"')),
    "checkpoint_index_chunks": loading(spoiled_index(moved_chunk)),
    "checkpoint_index_doubled_key": loading(doubled_key),
    "checkpoint_index_rest": loading(spoiled_index(lambda index: index["rest"].pop("extra"))),
    "checkpoint_index_too_large": too_large,
    "checkpoint_index_not_readable": loading(lambda path: None, name="1/" + "a" * 300),
    "checkpoint_header": loading(replaced(b'"pt"', b'"tf"', "rank0.safetensors")),
    "checkpoint_optimizer_settings": odd_groups,
    "checkpoint_random_state": odd_random,
    "checkpoint_same_names": of_two_stages,
    "checkpoint_unwanted": unwanted,
    "checkpoint_other_version": loading(replaced(b'"version": 3', b'"version": 1')),
    "checkpoint_cut": loading(spoiled_data(lambda data: data[:-1])),
    "checkpoint_other_bytes": loading(other_weight),
    "checkpoint_other_names": into(model(bias=True)),
    "checkpoint_other_shape": into(model(5)),
    "checkpoint_other_dtype": into(model(dtype=torch.bfloat16)),
    "checkpoint_other_groups": other_groups,
    "checkpoint_foreign_parameter": with_optimizer(lambda this: adam(model())),
    "checkpoint_odd_state": with_optimizer(odd_state),
    "checkpoint_odd_setting": with_optimizer(odd_setting),
    "checkpoint_odd_dtype": lambda: save_checkpoint(
        "1", model(dtype=torch.complex128), MoEMesh.single()
    ),
    "checkpoint_odd_name": named("a\nb"),
    "convert_no_tensor": from_dcp(
        other_metadata(lambda m: m.state_dict_metadata.update(step=BytesStorageMetadata()))
    ),
    "convert_other_class": from_dcp(
        lambda path: (path / ".metadata").write_bytes(pickle.dumps(Path.cwd))
    ),
    "convert_other_chunks": from_dcp(other_metadata(other_shape)),
    "convert_other_bytes": from_dcp(other_metadata(other_bytes)),
    "convert_no_bytes": from_dcp(spoiled_dcp_data),
    "convert_large_metadata": large_metadata,
    "checkpoint_odd_extra": named(step=torch.ones(2)),
    "checkpoint_extra_keys": named(steps={1: 2}),
    "checkpoint_extra_tuple": named(sizes=[(2, 3)]),
    "checkpoint_unfinished_name": named("last.part"),
    "checkpoint_part_of_the_ranks": of_part_of_the_ranks(save_checkpoint),
    "checkpoint_load_part_of_the_ranks": of_part_of_the_ranks(load_checkpoint),
    "checkpoint_no_mesh": lambda: save_checkpoint("1", model(), None),  # type: ignore[arg-type]  # wrong on purpose
}
