"""Checkpoints as folders of torch.distributed.checkpoint (DCP), and back.

    spmd-moe convert runs/001/checkpoints/000100 000100.dcp
    spmd-moe convert 000100.dcp 000100

One process does it, one chunk in memory at a time. torch's own tools read the result, such as
`dcp_to_torch_save`. What is not a tensor travels as JSON in a tensor of bytes, `spmd_moe.rest`.

torch stores the metadata of a DCP folder by pickle. It is read here by an unpickler that can make
the classes of that metadata and nothing else, and tensors are read with `weights_only=True`: a
folder from a stranger cannot run code. Objects that torch has pickled into a folder are refused.
"""

from __future__ import annotations

import io
import pickle
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from spmd_moe.core.errors import CheckpointError, explain
from spmd_moe.core.validate import PathLike, check_path
from spmd_moe.train.checkpoint.index import MAX_BYTES, is_grid
from spmd_moe.train.checkpoint.on_disk import INDEX, UNFINISHED, Reader, Writer, damaged, read_index
from spmd_moe.train.checkpoint.planners import run_plan
from spmd_moe.train.checkpoint.safetensors_file import DTYPE_NAMES, check_storable
from spmd_moe.train.checkpoint.strict_json import Json, from_json, to_json

REST = "spmd_moe.rest"
METADATA = ".metadata"  # of a DCP folder

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, and its shape


def convert(source: PathLike, target: PathLike) -> None:
    """Write a checkpoint of this package as a DCP folder, or a DCP folder as a checkpoint.

    Args:
        source: A folder that `save_checkpoint` wrote, or one that torch.distributed.checkpoint
            wrote, with the names of this package's model in it.
        target: The folder to make.

    Raises:
        CheckpointError: The source is damaged or is neither, or the target exists.

    Example:
        >>> convert("runs/001/checkpoints/000100", "000100.dcp")
        >>> dcp_to_torch_save("000100.dcp", "000100.pt")   # torch's own
    """
    source = check_path("convert", "source", source)
    target = check_path("convert", "target", target)
    is_dcp = (source / METADATA).is_file() and not (source / INDEX).exists()
    try:
        (_from_dcp if is_dcp else _to_dcp)(source, target)
    except CheckpointError as error:  # of the functions that save and load read and write here
        text = re.sub("^(load|save)_checkpoint:", "convert:", str(error))
        raise CheckpointError(text) from error


# --- chunks that are read when they are written -----------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the source."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], tuple[tuple[int, ...], Callable[[], Tensor]]]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """What torch.distributed.checkpoint asks of a tensor that is not torch's own."""
        about = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, at),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(at), torch.Size(shape)),
                    about,
                    torch.Size(self.shape),
                ),
            )
            for at, (shape, _) in self.chunks.items()
        ]


@final
class _ReadAndWrite(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        _, read = self.state_dict[index.fqn].chunks[tuple(index.offset or ())]
        tensor: Tensor = read()
        return tensor


def _bytes_stored(text: bytes) -> _Stored:
    tensor = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return _Stored(torch.uint8, (len(text),), {(0,): ((len(text),), lambda: tensor)})


# --- to DCP -----------------------------------------------------------------------------------


def _to_dcp(source: Path, target: Path) -> None:
    index = read_index(source)
    reader = Reader(source, index)
    writer = Writer(target, lambda: None)  # for its rules about names alone
    writer.check_free()
    part = target.with_name(f"{target.name}.{secrets.token_hex(8)}{UNFINISHED}")
    tensors = {
        name: _Stored(
            entry.dtype,
            entry.shape,
            {
                chunk.at: (chunk.shape, lambda c=chunk, n=name: reader.read(c, n))  # type: ignore[misc]  # mypy does not infer the defaults
                for chunk in entry.chunks
            },
        )
        for name, entry in index.tensors.items()
    }
    tensors[REST] = _bytes_stored(to_json(index.rest))

    def write() -> None:
        for name in index.files:
            reader.check_header(name)
        dcp.save(
            dict(tensors),
            storage_writer=dcp.FileSystemWriter(part),
            planner=_ReadAndWrite(flatten_state_dict=False),
            no_dist=True,
        )
        part.rename(target)

    try:
        run_plan("convert", target, write)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- from DCP ---------------------------------------------------------------------------------

_OF_METADATA = {
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata "
    "MetadataIndex StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch": "Size " + " ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES),
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath PurePosixPath",
    "pathlib._local": "PosixPath PurePosixPath",  # of Python 3.13
    "collections": "OrderedDict",
}


@final
class _OfMetadata(pickle.Unpickler):
    """Makes the classes above, which only hold data; every other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _OF_METADATA.get(module, "").split():
            raise pickle.UnpicklingError(f"{module}.{name} is not of a checkpoint's metadata")
        return super().find_class(module, name)


def _from_dcp(source: Path, target: Path) -> None:
    try:
        tensors, rest = _stored_by_dcp(source)
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged pickle or zip raises is of every kind
        raise damaged(source, f"{METADATA} cannot be used: {type(error).__name__}") from error
    check_storable((name, stored.dtype) for name, stored in tensors.items())
    writer = Writer(target, lambda: rest)
    planner = _ReadAndWrite(flatten_state_dict=False)
    try:
        run_plan(
            "convert",
            target,
            lambda: dcp.save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True),
        )
    finally:
        if writer.folder is not None:
            shutil.rmtree(writer.folder, ignore_errors=True)


def _stored_by_dcp(source: Path) -> tuple[dict[str, _Stored], Json]:
    """The tensors of a DCP folder and the rest, once the metadata is known to be sound."""
    if (source / METADATA).stat().st_size > MAX_BYTES:
        raise damaged(source, f"{METADATA} is larger than any that is written")
    with open(source / METADATA, "rb") as file:
        metadata = _OfMetadata(file).load()
    assert isinstance(metadata, Metadata)
    tensors = {}
    for name, about in metadata.state_dict_metadata.items():
        if not isinstance(about, TensorStorageMetadata):
            raise _pickled(source, name)
        shape, dtype = tuple(about.size), about.properties.dtype
        boxes = [(tuple(c.offsets), tuple(c.sizes)) for c in about.chunks if c.sizes.numel()]
        if shape and not torch.Size(shape).numel():
            continue
        if not is_grid(shape, boxes):
            raise damaged(source, f"the chunks of {name!r} are no grid that covers it")
        tensors[name] = _Stored(
            dtype,
            shape,
            {box[0]: (box[1], _reading(source, metadata, name, box, dtype)) for box in boxes},
        )
    rest: Json = {"extra": {}, "random": None, "optimizer": None}
    if REST in tensors:
        ((_, read),) = tensors.pop(REST).chunks.values()
        rest = from_json(bytes(read().tolist()))
    return tensors, rest


def _pickled(source: Path, name: str) -> CheckpointError:
    return CheckpointError(
        explain(
            "convert",
            f"{source.name!r} has {name!r}, which is no tensor",
            why="torch has pickled it, and an object from a stranger's pickle can run code",
            fixes=["a state dict of tensors only   # for torch.distributed.checkpoint.save"],
        )
    )


def _reading(
    source: Path, metadata: Metadata, name: str, box: Box, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Reads a chunk that torch has written: a file of `torch.save` inside a file."""
    at, shape = box
    info = metadata.storage_data[MetadataIndex(name, at)]
    path = source / Path(info.relative_path).name  # never a path that leads out of the folder

    def read() -> Tensor:
        with open(path, "rb") as file:
            file.seek(info.offset)
            data = file.read(min(info.length, path.stat().st_size))
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged pickle or zip raises is of every kind
            raise damaged(source, f"the bytes of {name!r} are no tensor") from error
        if type(tensor) is not Tensor or tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            raise damaged(source, f"the bytes of {name!r} are another tensor's")
        return tensor.contiguous()

    return read
