"""A disk that is full at any point of a save: the checkpoint before it is not touched."""

from __future__ import annotations

import builtins
import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
SAYS = "save_checkpoint: '2', on rank 0: "


def made(seed: int) -> MoE:
    layer = MoE(MoEConfig(4, 8, RouterConfig(2, 1)), MESH)
    init_weights(layer, MESH, seed=seed)
    return layer


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Full:
    """What a save asks of the disk, counted; from the given call on, the disk refuses."""

    def __init__(self, first: int) -> None:
        self.first, self.calls = first, list[str]()

    def asked(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) >= self.first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def watched(self, name: str, call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            self.asked(name)
            return call(*args, **kwargs)

        return instead

    def open(self, *args: Any) -> Any:
        self.asked("open")
        file = builtins.open(*args)  # noqa: SIM115  # what is returned closes it
        real, owner = file.write, self

        class Watched:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: Any) -> Any:
                owner.asked("write")
                return real(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Watched()


@contextmanager
def full(disk: Full) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch.object(on_disk, "open", disk.open, create=True))
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename")):
            instead = disk.watched(name, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, instead))
        yield


def test_refused_at_every_call(tmp_path: Path) -> None:
    old, new = made(0), made(1)
    save_checkpoint(tmp_path / "1", old, MESH)
    before, calls = bytes_below(tmp_path), Full(1000)
    with full(calls):
        save_checkpoint(tmp_path / "2", new, MESH)
    assert set(calls.calls) == {"mkdir", "open", "write", "fsync", "rename"}
    assert len(calls.calls) > 8 and calls.calls[-2:] == ["rename", "fsync"]
    for first in range(1, len(calls.calls)):  # at the last call, all is there already
        for file in (tmp_path / "2").glob("*"):
            file.unlink()
        if (tmp_path / "2").exists():
            (tmp_path / "2").rmdir()
        with full(Full(first)), pytest.raises(CheckpointError) as told:
            save_checkpoint(tmp_path / "2", new, MESH)
        assert str(told.value).startswith(SAYS + "No space left on device.\n")
        assert bytes_below(tmp_path) == before and latest_checkpoint(tmp_path) == tmp_path / "1"
    loaded = made(2)
    load_checkpoint(tmp_path / "1", loaded, MESH)
    assert torch.equal(loaded.experts.w1_eFD, old.experts.w1_eFD)
    save_checkpoint(tmp_path / "2", new, MESH)
    assert latest_checkpoint(tmp_path) == tmp_path / "2"


def test_full_after_every_number_of_bytes(tmp_path: Path) -> None:
    """By the system's own limit, so that what is written late, in a flush or at the end, counts."""
    layer = made(0)
    save_checkpoint(tmp_path / "1", layer, MESH)
    before = bytes_below(tmp_path)
    sizes = sorted(map(len, before.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in {0, 1, sizes[0] // 2, sizes[0] - 1, sizes[0], sizes[1] // 2, sizes[1] - 1}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError) as told:
                save_checkpoint(tmp_path / "2", layer, MESH)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(told.value).startswith(SAYS + "File too large.\n")
        assert bytes_below(tmp_path) == before and latest_checkpoint(tmp_path) == tmp_path / "1"
    save_checkpoint(tmp_path / "2", layer, MESH)
    assert latest_checkpoint(tmp_path) == tmp_path / "2"
