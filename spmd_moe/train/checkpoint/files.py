"""A checkpoint on disk: raw bytes, and an index in JSON that says what they are. No pickle.

    000100/
      index.json      names, dtypes, shapes; for each part its place, file, first byte, checksum
      rank0.bin       the parts that rank 0 wrote, one after another

It is written next to its place, under a name that ends in `.part`, and renamed when the last byte
is on the disk: a folder without that ending is complete.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from spmd_moe.core.errors import CheckpointError, explain

INDEX, FORMAT, VERSION = "index.json", "spmd_moe checkpoint", 1
UNFINISHED = ".part"


@final
@dataclass(frozen=True, slots=True)
class Chunk:
    """Where the bytes of a part are."""

    at: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    bytes: int
    checksum: int


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@final
@dataclass(frozen=True, slots=True)
class Index:
    """What a checkpoint holds; `rest` is what is not a tensor."""

    tensors: Mapping[str, Entry]
    rest: Any


# --- writing ------------------------------------------------------------------------------------


@final
class Writer(StorageWriter):
    """Writes the parts of this rank; the coordinator adds the index and renames."""

    def __init__(self, path: Path, rest: Any) -> None:
        self.path, self.rest = path, rest
        self.folder = path.with_name(path.name + UNFINISHED)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before anybody writes."""
        if self.folder.exists():  # left over from a save that was cut short
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return [replace(plan, storage_data=f"rank{i}.bin") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with open(self.folder / plan.storage_data, "wb") as file:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor) and item.tensor_data is not None
                data = tensor.detach().to("cpu").contiguous()
                start, view = file.tell(), _bytes_of(data)
                file.write(view)
                chunk = Chunk(
                    tuple(item.tensor_data.chunk.offsets),
                    tuple(data.shape),
                    plan.storage_data,
                    start,
                    len(view),
                    zlib.crc32(view),
                )
                results.append(WriteResult(item.index, len(view), chunk))
            _to_disk(file)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all ranks have written."""
        tensors: dict[str, dict[str, Any]] = {}
        for result in (r for of_rank in results for r in of_rank):
            about = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(about, TensorStorageMetadata)
            dtype = str(about.properties.dtype).removeprefix("torch.")
            entry = {"dtype": dtype, "shape": list(about.size), "chunks": []}
            fields = {name: getattr(result.storage_data, name) for name in Chunk.__slots__}
            tensors.setdefault(result.index.fqn, entry)["chunks"].append(fields)
        index = {"format": FORMAT, "version": VERSION, "rest": self.rest, "tensors": tensors}
        with open(self.folder / INDEX, "wb") as file:
            file.write(json.dumps(index).encode())
            _to_disk(file)
        self.folder.rename(self.path)
        _folder_to_disk(self.path.parent)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, without numpy."""
    assert type(tensor) is Tensor and tensor.is_contiguous(), "it has memory of its own"
    size = tensor.numel() * tensor.itemsize
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


# --- reading ------------------------------------------------------------------------------------


def read_index(path: Path) -> Index:
    """What is in the checkpoint, once it is known to be one, and to be whole."""
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.glob("*") if (p / INDEX).is_file())
        raise _refused(
            path,
            "is not there" if not path.exists() else "is not a folder",
            "a checkpoint is a folder",
            [f"path={name!r}   # beside it" for name in near[-3:]]
            or ["save_checkpoint(path, ...)"],
        )
    if path.name.endswith(UNFINISHED) or not (path / INDEX).is_file():
        raise _refused(
            path,
            f"has no {INDEX}" if not (path / INDEX).is_file() else "was never finished",
            "a save that was cut short has none, nor has what another program wrote",
            ["latest_checkpoint(folder)   # the last one that is complete"],
        )
    try:
        found = json.loads((path / INDEX).read_bytes())
        known = found.get("format") == FORMAT and found.get("version") == VERSION
        tensors = {name: _entry(entry) for name, entry in found["tensors"].items() if known}
        index = Index(tensors, found["rest"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{INDEX} cannot be read") from error
    if not known:
        raise _refused(
            path,
            f"is of format {found['format']!r}, version {found['version']}",
            f"this is for {FORMAT!r}, version {VERSION}",
            ["the version of spmd_moe that wrote it"],
        )
    _check_sizes(path, index)
    return index


def _entry(found: Any) -> Entry:
    dtype = getattr(torch, found["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(found["dtype"])
    chunks = tuple(
        Chunk(
            tuple(map(int, c["at"])),
            tuple(map(int, c["shape"])),
            Path(c["file"]).name,  # never a path that leads out of the folder
            int(c["start"]),
            int(c["bytes"]),
            int(c["checksum"]),
        )
        for c in found["chunks"]
    )
    return Entry(dtype, tuple(map(int, found["shape"])), chunks)


def _check_sizes(path: Path, index: Index) -> None:
    ends: dict[str, int] = {}
    for name, entry in index.tensors.items():
        for chunk in entry.chunks:
            if math.prod(chunk.shape) * entry.dtype.itemsize != chunk.bytes:
                raise _damaged(path, f"{INDEX} contradicts itself about {name!r}")
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.bytes)
    for name, size in ends.items():
        file = path / name
        have = file.stat().st_size if file.is_file() else 0
        if have < size:
            raise _damaged(path, f"{name} has {have} bytes of {size}")


@final
class Reader(StorageReader):
    """Reads the parts that this rank needs, whoever wrote them."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.tensors = path, index.tensors

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [
                        ChunkStorageMetadata(torch.Size(c.at), torch.Size(c.shape))
                        for c in entry.chunks
                    ],
                )
                for name, entry in self.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for place, items in wanted.items():
            entry = self.tensors[place.fqn]
            chunk = next(c for c in entry.chunks if c.at == tuple(place.offset or ()))
            stored = self._read(chunk, entry.dtype, place.fqn)
            for item in items:
                part = stored
                for dim, (start, size) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    part = part.narrow(dim, start, size)
                target = planner.resolve_tensor(item)
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, chunk: Chunk, dtype: torch.dtype, name: str) -> Tensor:
        data = torch.empty(chunk.shape, dtype=dtype)
        view = _bytes_of(data)
        with open(self.path / chunk.file, "rb") as file:
            file.seek(chunk.start)
            read = file.readinto(view)
        if read != chunk.bytes or zlib.crc32(view) != chunk.checksum:
            raise _damaged(self.path, f"{chunk.file} has other bytes for {name!r} than were saved")
        return data

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _damaged(path: Path, what: str) -> CheckpointError:
    return _refused(
        path,
        f"is damaged: {what}",
        "what was saved is not all there",
        ["an earlier checkpoint, which no later save touches"],
    )


def _refused(path: Path, what: str, why: str, fixes: list[str]) -> CheckpointError:
    return CheckpointError(
        explain("load_checkpoint", f"{path.name!r} {what}", why=why, fixes=fixes)
    )
