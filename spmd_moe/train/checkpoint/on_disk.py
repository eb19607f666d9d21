"""A checkpoint on disk: safetensors files, and an index that says what they hold. No pickle.

    000100/
      index.json             names, dtypes, shapes; of each chunk its place, file, start, CRC-32
      rank0.safetensors      the chunks that rank 0 wrote

Every save writes into a folder of its own, `000100.<16 hex digits>.part`, and renames it when the
last byte is on the disk. The rename is the claim to the name: it fails where another save has
finished first. So a folder without that ending is complete, and no save changes another's files.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
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
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from spmd_moe.core.errors import CheckpointError, explain
from spmd_moe.train.checkpoint.index import (
    FORMAT,
    MAX_BYTES,
    VERSION,
    Chunk,
    Entry,
    File,
    Index,
    decode,
    encode,
    other_version,
)
from spmd_moe.train.checkpoint.safetensors_file import chunk_name, make_header
from spmd_moe.train.checkpoint.strict_json import Json

INDEX, UNFINISHED = "index.json", ".part"


# --- writing ----------------------------------------------------------------------------------


@final
class Writer(StorageWriter):
    """Writes the chunks of this rank; the coordinator adds the index and renames the folder."""

    def __init__(self, path: Path, rest: Callable[[], Json]) -> None:
        self.path, self.rest = path, rest
        self.folder: Path | None = None  # this save's own; the coordinator makes it

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before any rank writes."""
        self.check_free()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}{UNFINISHED}")
        folder.mkdir()
        self.folder = folder
        return [
            replace(plan, storage_data=(folder.name, f"rank{rank}.safetensors"))
            for rank, plan in enumerate(plans)
        ]

    def check_free(self) -> None:
        if os.path.lexists(self.path):
            raise CheckpointError(
                explain(
                    "save_checkpoint",
                    f"{self.path.name!r} exists",
                    why="a checkpoint is never overwritten: it may be the only complete one",
                    fixes=["a path of its own for each step, such as folder / '000100'"],
                )
            )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            with self._taken_or_refused():
                results = self._write(plan, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        results = []
        folder, name = plan.storage_data
        items = sorted(plan.items, key=_order)
        text = make_header(map(_described, items))
        with open(self.path.with_name(folder) / name, "wb") as file:
            file.write(text)
            for item in items:
                data = _data(planner.resolve_data(item))  # has to live as long as its bytes
                view = _bytes_of(data)
                at, shape = _box(item)
                chunk = Chunk(at, shape, name, file.tell(), zlib.crc32(view))
                file.write(view)
                results.append(WriteResult(item.index, len(view), chunk))
            size = file.tell()
            _to_disk(file)
        record = File(size, len(text))
        return [replace(r, storage_data=(r.storage_data, record)) for r in results]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all ranks have written."""
        assert self.folder is not None
        files: dict[str, File] = {}
        tensors: dict[str, Entry] = {}
        for result in (r for of_rank in results for r in of_rank):
            about = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(about, TensorStorageMetadata)
            chunk, files[chunk.file] = result.storage_data
            fresh = Entry(about.properties.dtype, tuple(about.size), ())
            entry = tensors.get(result.index.fqn, fresh)
            tensors[result.index.fqn] = replace(entry, chunks=(*entry.chunks, chunk))
        with self._taken_or_refused():
            with open(self.folder / INDEX, "wb") as file:
                file.write(encode(Index(files, tensors, self.rest())))
                _to_disk(file)
            _folder_to_disk(self.folder)
            self.folder.rename(self.path)
        _folder_to_disk(self.path.parent)
        self._remove_others()

    @contextmanager
    def _taken_or_refused(self) -> Iterator[None]:
        """Another save may have got the name meanwhile, and removed the folder of this one."""
        try:
            yield
        except OSError:
            self.check_free()
            raise

    def _remove_others(self) -> None:
        """What killed saves of this name have left, and saves that can no longer get the name."""
        unfinished = re.compile(rf"{re.escape(self.path.name)}\.[0-9a-f]{{16}}{UNFINISHED}")
        with suppress(OSError):
            for folder in list(self.path.parent.iterdir()):
                if unfinished.fullmatch(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _order(item: WriteItem) -> tuple[object, ...]:
    """Wide dtypes first, so that each tensor is aligned; else by name and place."""
    assert item.tensor_data is not None
    return -item.tensor_data.properties.dtype.itemsize, item.index.fqn, _box(item)


def _box(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)


def _described(item: WriteItem) -> tuple[str, torch.dtype, tuple[int, ...]]:
    about = item.tensor_data
    assert about is not None
    at, shape = _box(item)
    return chunk_name(item.index.fqn, at, shape, about.size), about.properties.dtype, shape


def _data(tensor: object) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().to("cpu").contiguous()


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


# --- reading ----------------------------------------------------------------------------------


def read_index(path: Path) -> Index:
    """The index of a checkpoint, after every check that does not need the tensors' bytes."""
    try:
        _check_there(path)
        if _size_of_file(path / INDEX) > MAX_BYTES:
            raise damaged(path, f"{INDEX} is larger than any that is written")
        text = (path / INDEX).read_bytes()
        version = other_version(text)
        if version:
            raise refused(
                path,
                f"is of version {version}",
                f"this release reads {FORMAT!r} of version {VERSION}",
                ["the release of spmd_moe that wrote it"],
            )
        index = decode(text)
        for name, file in index.files.items():
            have = _size_of_file(path / name)
            if have != file.bytes:
                raise damaged(path, f"{name} has {have} bytes instead of {file.bytes}")
    except ValueError as error:
        raise damaged(path, f"{INDEX} cannot be used: {error}") from None
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from None
    return index


def _check_there(path: Path) -> None:
    if not path.is_dir():
        near = sorted(p.name for p in _folders(path.parent) if (p / INDEX).is_file())
        raise refused(
            path,
            "is not there" if not path.exists() else "is not a folder",
            "a checkpoint is a folder",
            [f"path={name!r}   # beside it" for name in near[-3:]]
            or ["save_checkpoint(path, ...)"],
        )
    if path.name.endswith(UNFINISHED) or not (path / INDEX).is_file():
        raise refused(
            path,
            f"has no {INDEX}" if not (path / INDEX).is_file() else "was never finished",
            "a save that was interrupted leaves none, and neither do other programs",
            ["latest_checkpoint(folder)   # the last one that is complete"],
        )


def _folders(parent: Path) -> Iterable[Path]:
    return parent.iterdir() if parent.is_dir() else ()


def _size_of_file(path: Path) -> int:
    """0 of what is no ordinary file, such as a pipe, which could not be read to its end."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return 0
    return about.st_size if stat.S_ISREG(about.st_mode) else 0


@final
class Reader(StorageReader):
    """Reads the chunks that this rank needs, from the files of all ranks."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index

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
                for name, entry in self.index.tensors.items()
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
        chunks = {place: self._chunk(place) for place in wanted}
        for name in sorted({chunk.file for chunk in chunks.values()}):
            self.check_header(name)
        for place, items in wanted.items():
            stored = self.read(chunks[place], place.fqn)
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

    def _chunk(self, place: MetadataIndex) -> Chunk:
        chunks = self.index.tensors[place.fqn].chunks
        return next(c for c in chunks if c.at == tuple(place.offset or ()))

    def check_header(self, name: str) -> None:
        """Other programs read the file by its header: it must say what the index says."""
        found = [
            (chunk.start, chunk_name(tensor, chunk.at, chunk.shape, entry.shape), entry, chunk)
            for tensor, entry in self.index.tensors.items()
            for chunk in entry.chunks
            if chunk.file == name
        ]
        text = make_header(
            (tensor, entry.dtype, chunk.shape)
            for _, tensor, entry, chunk in sorted(found, key=lambda row: row[0])
        )
        with open(self.path / name, "rb") as file:
            said = file.read(self.index.files[name].header_bytes)
        if said != text:
            raise damaged(self.path, f"the header of {name} is not the one that was saved")

    def read(self, chunk: Chunk, name: str) -> Tensor:
        """The chunk of a tensor of that name, once its bytes are known to be those saved."""
        data = torch.empty(chunk.shape, dtype=self.index.tensors[name].dtype, device="cpu")
        view = _bytes_of(data)
        with open(self.path / chunk.file, "rb") as file:
            file.seek(chunk.start)
            read = file.readinto(view)
        if read != len(view) or zlib.crc32(view) != chunk.crc32:
            raise damaged(self.path, f"{chunk.file} has other bytes for {name!r} than were saved")
        return data

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def damaged(path: Path, what: str) -> CheckpointError:
    return refused(
        path,
        f"is damaged: {what}",
        "what would be loaded is not what was saved",
        ["an earlier checkpoint, which no later save touches"],
    )


def refused(path: Path, what: str, why: str, fixes: list[str]) -> CheckpointError:
    return CheckpointError(
        explain("load_checkpoint", f"{path.name!r} {what}", why=why, fixes=fixes)
    )
