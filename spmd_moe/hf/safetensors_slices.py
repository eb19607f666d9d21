"""Safetensors files: their headers, and reads and writes of a box of a tensor.

The format itself is in `train/checkpoint/safetensors_file.py`, which makes the headers.
A folder has one file, `model.safetensors`, or several and an index that says which has which key.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from spmd_moe.train.checkpoint.safetensors_file import DTYPES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE = 8 << 20  # bytes that are read or written at a time
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors package
# Of the dtypes of the format, those whose values are the numbers that a model computes with: 8-bit
# floats, for example, come with scales.
READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")

Range = tuple[int, int]  # first index, and how many


# What reading a damaged or hostile header or index may raise.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class DamagedFileError(Exception):
    """What is wrong with a file, and its name; the caller says where that was found."""


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: `start` is its first byte."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@final
@dataclass(frozen=True, slots=True)
class Folder:
    """What lies in the files of a checkpoint; `headers` and `index` are its text as it was read."""

    entries: Mapping[str, Entry]
    headers: Mapping[str, bytes]
    index: bytes | None

    def text(self) -> bytes:
        """All that ranks have to read alike."""
        return b"".join([*self.headers.values(), self.index or b""])


# --- headers ------------------------------------------------------------------------------------


def read_folder(path: Path) -> Folder:
    """The headers of all files; raises `DamagedFileError` if they are not whole."""
    index, where = None, None
    files = [SINGLE]
    if (path / INDEX).is_file():
        index = (path / INDEX).read_bytes()
        try:
            where = {str(key): str(file) for key, file in json.loads(index)["weight_map"].items()}
        except _UNREADABLE:
            raise DamagedFileError(INDEX, "is not an index: it has no weight_map") from None
        files = sorted(set(where.values()))
    entries: dict[str, Entry] = {}
    headers = {}
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise DamagedFileError(file, "is not there")
        headers[file] = _header_text(path / file)
        of_file = entries_of(headers[file], file, (path / file).stat().st_size)
        entries.update({key: e for key, e in of_file.items() if where is None or key in where})
    for key, file in (where or {}).items():
        if key not in entries or entries[key].file != file:
            raise DamagedFileError(file, f"has no {key!r}, which {INDEX} says it has")
    return Folder(entries, headers, index)


def _header_text(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if length > min(_LONGEST_HEADER, size - 8):
            raise DamagedFileError(path.name, f"is cut or of another format: {size} bytes")
        return length.to_bytes(8, "little") + file.read(length)


def entries_of(header: bytes, file: str, size: int | None) -> dict[str, Entry]:
    """The tensors of a file of `size` bytes; None: it is yet to be written."""
    entries = {}
    try:
        found: dict[str, Any] = json.loads(header[8:])
        found.pop("__metadata__", None)
        for key, about in found.items():
            start, end = map(int, about["data_offsets"])
            shape = tuple(map(int, about["shape"]))
            entry = Entry(file, str(about["dtype"]), shape, len(header) + start)
            entries[key] = entry
            wrong = entry.dtype in READABLE and entry.bytes != end - start
            if wrong or min((start, *shape)) < 0:
                raise DamagedFileError(file, f"contradicts itself about {key!r}")
            if size is not None and len(header) + end > size:
                raise DamagedFileError(
                    file, f"is cut: it has {size} bytes, {key!r} ends at {len(header) + end}"
                )
    except _UNREADABLE:
        raise DamagedFileError(file, "has a header that cannot be read") from None
    return entries


def in_file_order(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> list[str]:
    """Keys in the order of the safetensors package: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda key: (-DTYPES[tensors[key][0]].itemsize, key))


# --- boxes --------------------------------------------------------------------------------------


def pieces(box: Sequence[Range], itemsize: int, limit: int = PIECE) -> Iterator[tuple[Range, ...]]:
    """The box in parts of at most `limit` bytes."""
    sizes = [size for _, size in box]
    if 0 in sizes:
        return
    if math.prod(sizes) * itemsize <= limit or max(sizes) == 1:
        yield tuple(box)
        return
    dim = next(d for d, size in enumerate(sizes) if size > 1)
    first, half = box[dim][0], sizes[dim] // 2
    for part in ((first, half), (first + half, sizes[dim] - half)):
        yield from pieces([*box[:dim], part, *box[dim + 1 :]], itemsize, limit)


def runs(shape: Sequence[int], box: Sequence[Range]) -> tuple[list[int], int]:
    """Where each contiguous part of a box begins in a row-major tensor; and how long each is."""
    last = len(shape) - 1
    while last > 0 and box[last] == (0, shape[last]):
        last -= 1
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    length = math.prod(size for _, size in box[last:]) if shape else 1
    first = box[last][0] * strides[last] if shape else 0
    outer = [range(start, start + size) for start, size in box[:last]]
    return [
        first + sum(i * stride for i, stride in zip(at, strides, strict=False))
        for at in product(*outer)
    ], length


@final
class FileIO:
    """One open file; counts the bytes that are read and written."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.number = os.open(path, os.O_RDWR if write else os.O_RDONLY)
        self.name, self.bytes = path.name, 0

    def to_disk(self) -> None:
        os.fsync(self.number)

    def close(self) -> None:
        os.close(self.number)

    def read(self, entry: Entry, shape: Sequence[int], box: Sequence[Range]) -> Tensor:
        """A box of a tensor, as a new tensor; `shape` is that of the file, or a finer one."""
        dtype = DTYPES[entry.dtype]
        buffer = bytearray(math.prod(size for _, size in box) * dtype.itemsize)
        begins, length = runs(shape, box)
        view, step = memoryview(buffer), length * dtype.itemsize
        for i, begin in enumerate(begins):
            part = view[i * step : (i + 1) * step]
            self._fill(part, entry.start + begin * dtype.itemsize)
        self.bytes += len(buffer)
        return torch.frombuffer(buffer, dtype=dtype).view([size for _, size in box])

    def _fill(self, part: memoryview, at: int) -> None:
        while len(part):
            done = os.preadv(self.number, [part], at)
            if not done:
                raise DamagedFileError(self.name, "became shorter while it was read")
            part, at = part[done:], at + done

    def write(self, entry: Entry, shape: Sequence[int], box: Sequence[Range], data: Tensor) -> None:
        """Write `data` into a box of a tensor."""
        size = DTYPES[entry.dtype].itemsize
        buffer = bytearray(data.numel() * size)
        torch.frombuffer(buffer, dtype=data.dtype).view(data.shape).copy_(data)
        begins, length = runs(shape, box)
        view, step = memoryview(buffer), length * size
        for i, begin in enumerate(begins):
            part, at = view[i * step : (i + 1) * step], entry.start + begin * size
            while len(part):
                done = os.pwrite(self.number, part, at)
                part, at = part[done:], at + done
        self.bytes += len(buffer)
