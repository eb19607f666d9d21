"""The index of a checkpoint: what it holds and where, under a SHA-256 digest.

    {"format": "spmd_moe checkpoint", "version": 3, "sha256": "...", "index": {
      "files":   {"rank0.safetensors": {"bytes": 5120, "header_bytes": 512}},
      "tensors": {"router.weight_ED": {"dtype": "F32", "shape": [8, 64], "chunks": [
                   {"at": [0, 0], "shape": [4, 64], "file": "rank0.safetensors",
                    "start": 512, "crc32": 1234}, ...]}},
      "rest":    {...}}}

The digest is compared before anything is parsed. An index whose digest is right may still have been
made by another program, so every number is checked before it is used: the chunks of a tensor form
a grid that covers it exactly, and the chunks of a file cover it exactly, so no size can exceed
what is on the disk.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import torch

from spmd_moe.train.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES
from spmd_moe.train.checkpoint.strict_json import Json, from_json, to_json

FORMAT, VERSION = "spmd_moe checkpoint", 3
MAX_BYTES = 2**30  # of an index

_HEAD = b'{"format": "%s", "version": %d, "sha256": "' % (FORMAT.encode(), VERSION)
_BODY, _END = b'", "index": ', b"}"
_FILE = re.compile(r"rank(0|[1-9][0-9]{0,8})\.safetensors")
_OTHER_VERSION = re.compile(rb'\{"format": "%s", "version": ([0-9]{1,9}),' % FORMAT.encode())
_BIGGEST = 2**62


@final
@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where its bytes are."""

    at: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    crc32: int


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@final
@dataclass(frozen=True, slots=True)
class File:
    """A file of tensors."""

    bytes: int
    header_bytes: int


@final
@dataclass(frozen=True, slots=True)
class Index:
    """What a checkpoint holds; `rest` is what is not a tensor."""

    files: Mapping[str, File]
    tensors: Mapping[str, Entry]
    rest: Json
    sha256: str = ""  # of an index that was read


def encode(index: Index) -> bytes:
    """The text of index.json."""
    tensors = {
        name: {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "chunks": [_json_of(chunk) for chunk in entry.chunks],
        }
        for name, entry in index.tensors.items()
    }
    files = {name: _json_of(file) for name, file in index.files.items()}
    body = to_json({"files": files, "tensors": tensors, "rest": index.rest})
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _BODY + body + _END


def _json_of(record: Chunk | File) -> Json:
    values = ((field.name, getattr(record, field.name)) for field in fields(record))
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values}


def other_version(text: bytes) -> str:
    """The version of an index that this program does not read; empty if it reads it, or if there
    is no version in it."""
    found = _OTHER_VERSION.match(text)
    return found[1].decode() if found and int(found[1]) != VERSION else ""


def decode(text: bytes) -> Index:
    """Raise ValueError, and nothing else, for what `encode` does not write."""
    digest = text[len(_HEAD) : len(_HEAD) + 64]
    body = text[len(_HEAD) + 64 + len(_BODY) : -len(_END)]
    _need(text == _HEAD + digest + _BODY + body + _END, "it is cut short or changed")
    _need(digest == hashlib.sha256(body).hexdigest().encode(), "its SHA-256 digest is another")
    found = _object(from_json(body), ("files", "tensors", "rest"))
    _need(isinstance(found["files"], dict), "'files' must be an object")
    _need(isinstance(found["tensors"], dict), "'tensors' must be an object")
    files = {name: _file(name, file) for name, file in found["files"].items()}
    tensors = {name: _entry(name, entry) for name, entry in found["tensors"].items()}
    _check_extents(files, tensors)
    return Index(files, tensors, found["rest"], digest.decode())


def _file(name: str, found: Json) -> File:
    _need(_FILE.fullmatch(name) is not None, f"{name[:40]!r} is not the name of a file of tensors")
    values = _object(found, ("bytes", "header_bytes"))
    return File(_integer(values["bytes"]), _integer(values["header_bytes"], least=8))


def _entry(name: str, found: Json) -> Entry:
    values = _object(found, ("dtype", "shape", "chunks"))
    dtype = values["dtype"]
    _need(isinstance(dtype, str) and dtype in DTYPES, f"dtype of {name!r}")
    _need(isinstance(values["chunks"], list), f"chunks of {name!r}")
    shape = _integers(values["shape"], least=1)
    entry = Entry(DTYPES[dtype], shape, tuple(map(_chunk, values["chunks"])))
    _need(is_grid(shape, [(c.at, c.shape) for c in entry.chunks]), f"chunks of {name!r}")
    return entry


def _chunk(found: Json) -> Chunk:
    values = _object(found, ("at", "shape", "file", "start", "crc32"))
    file, crc32 = values["file"], _integer(values["crc32"])
    _need(isinstance(file, str) and crc32 < 2**32, "a chunk")
    at, shape = _integers(values["at"]), _integers(values["shape"], least=1)
    return Chunk(at, shape, file, _integer(values["start"]), crc32)


def is_grid(whole: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """The boxes, each given by where it begins and its shape, cover the whole, each place once.

    Only grids pass: every layout cuts each dim at the same places for all of the others.
    """
    if {len(at) for at, _ in boxes} | {len(shape) for _, shape in boxes} != {len(whole)}:
        return False
    cuts = [sorted({at[dim] for at, _ in boxes}) for dim in range(len(whole))]
    ends = [
        dict(zip(starts, [*starts[1:], size], strict=True))
        for starts, size in zip(cuts, whole, strict=True)
    ]
    fit = all(
        start + size == end[start]
        for at, shape in boxes
        for start, size, end in zip(at, shape, ends, strict=True)
    )
    first = all(starts[0] == 0 for starts in cuts)
    places = {tuple(at) for at, _ in boxes}
    return fit and first and len(places) == len(boxes) == math.prod(map(len, cuts))


def _check_extents(files: Mapping[str, File], tensors: Mapping[str, Entry]) -> None:
    """The header and the chunks of each file cover it, each byte once."""
    extents: dict[str, list[tuple[int, int]]] = {name: [] for name in files}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            _need(chunk.file in files, f"file of {name!r}")
            size = math.prod(chunk.shape) * entry.dtype.itemsize
            extents[chunk.file].append((chunk.start, chunk.start + size))
    for name, file in files.items():
        end = file.header_bytes
        for start, stop in sorted(extents[name]):
            _need(start == end, f"chunks in {name}")
            end = stop
        _need(end == file.bytes, f"size of {name}")


# --- single values ----------------------------------------------------------------------------


def _object(found: Json, keys: Iterable[str]) -> dict[str, Any]:
    _need(isinstance(found, dict) and found.keys() == set(keys), f"an object of {', '.join(keys)}")
    return dict(found)


def _integer(found: Json, least: int = 0) -> int:
    _need(type(found) is int and least <= found < _BIGGEST, "an integer")
    return int(found)


def _integers(found: Json, least: int = 0) -> tuple[int, ...]:
    _need(isinstance(found, list) and len(found) <= 64, "a list of integers")
    return tuple(_integer(n, least) for n in found)


def _need(fine: bool, what: str) -> None:
    if not fine:
        raise ValueError(what if what.startswith("it") else f"wrong in it: {what}")
