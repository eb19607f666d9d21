"""`hf.save`: each rank writes its parts into a checkpoint that transformers loads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from spmd_types import Shard
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from spmd_moe.core.errors import CheckpointError, SpmdMoeError, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE
from spmd_moe.core.validate import PathLike, check_path, check_positive_ints
from spmd_moe.hf.checkpoint_layout import Layout, agreed, needed_layout, rows_and_parts, tensor_of
from spmd_moe.hf.element_map import FileTensor, Part
from spmd_moe.hf.safetensors_slices import (
    INDEX,
    SINGLE,
    Entry,
    FileIO,
    entries_of,
    in_file_order,
    pieces,
)
from spmd_moe.train.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, make_header
from spmd_moe.train.obligations import Obligation
from spmd_moe.train.storage_mesh import REPLICA, shard_group

Rows: TypeAlias = Mapping[str, tuple[Obligation, Part]]
UNFINISHED = ".part"


@torch.no_grad()
def save(
    model: nn.Module, folder: PathLike, mesh: MoEMesh, *, max_shard_bytes: int = 50_000_000_000
) -> int:
    """Write a checkpoint that transformers loads. Every rank must call it.

    A model that was loaded is written into the same files, in the same order; otherwise a file has
    at most `max_shard_bytes`. Files get their names when all ranks have written.

    Args:
        model: A model that `swap` has changed; `parallelize` may have stored it since.
        folder: Is made if it is not there; has no checkpoint yet.
        mesh: The mesh of the model.
        max_shard_bytes: For a model that was never loaded.

    Returns:
        How many bytes of the files this rank has written.

    Raises:
        CheckpointError: A checkpoint is there already, or the disk refused.

    Example:
        >>> spmd_moe.hf.save(model, "trained", mesh)
    """
    path = check_path("hf.save", "folder", folder)
    layout = needed_layout("hf.save", model, mesh)
    check_positive_ints("hf.save", max_shard_bytes=max_shard_bytes)
    there = sorted(p.name for p in path.glob("*.safetensors*") if p.suffix != UNFINISHED)
    settings = {"folder": path.name, "there": there, "max_shard_bytes": max_shard_bytes}
    mesh.check_ranks_agree("hf.save", settings)
    if there:
        raise CheckpointError(
            explain(
                "hf.save",
                f"{path.name!r} has {there[0]} already",
                why="a checkpoint is never written over: it may be the only complete one",
                fixes=["a folder of its own for each step"],
            )
        )
    rows = rows_and_parts(model, mesh)
    headers, index = _files(layout, rows, max_shard_bytes)
    first = all(mesh[role].rank == 0 for role in DENSE)
    entries = {
        key: entry
        for name, header in headers.items()
        for key, entry in entries_of(header, name, None).items()
    }
    mine = [
        tensor
        for tensor in _with_aliases(layout, entries)
        if _writes(model, rows[tensor.names[0]][0], mesh)
    ]
    parts = {name: part for name, (_, part) in rows.items()}
    with _removed_if_it_fails(path, (*headers, INDEX) if first else ()):
        agreed("hf.save", path, mesh, lambda: _make(path, headers) if first else 0)
        written = agreed("hf.save", path, mesh, lambda: _write(path, entries, mine, parts))
        agreed("hf.save", path, mesh, lambda: _finish(model, path, headers, index) if first else 0)
    return written


# --- which files --------------------------------------------------------------------------------

Tensors: TypeAlias = Mapping[str, tuple[str, Sequence[int]]]  # key: dtype and shape


def _files(
    layout: Layout, rows: Rows, max_shard_bytes: int
) -> tuple[dict[str, bytes], bytes | None]:
    """The header of every file, and the index."""
    source = layout.source
    tensors: dict[str, tuple[str, Sequence[int]]] = {}
    for tensor in _with_aliases(layout, source.entries if source else {}):
        row, part = rows[tensor.names[0]]
        dtype = DTYPE_NAMES[part.tensor.dtype]
        if row.is_buffer and source is not None and tensor.key in source.entries:
            dtype = source.entries[tensor.key].dtype  # a buffer keeps its own dtype
        tensors[tensor.key] = dtype, tensor.shape(part.whole)
    if source is not None and tensors.keys() == source.entries.keys():
        if all(source.entries[key].dtype == dtype for key, (dtype, _) in tensors.items()):
            return dict(source.headers), source.index
        groups: Mapping[str, Tensors] = {
            name: {key: tensors[key] for key, e in source.entries.items() if e.file == name}
            for name in source.headers
        }
    else:
        groups = _in_shards(tensors, max_shard_bytes)
    headers = {
        name: make_header(
            (key, DTYPES[group[key][0]], group[key][1]) for key in in_file_order(group)
        )
        for name, group in groups.items()
    }
    return headers, _index(tensors, groups) if len(groups) > 1 else None


def _in_shards(tensors: Tensors, limit: int) -> dict[str, Tensors]:
    groups: list[dict[str, tuple[str, Sequence[int]]]] = [{}]
    room = limit
    for key, about in tensors.items():
        if _bytes(about) > room and groups[-1]:
            groups.append({})
            room = limit
        groups[-1][key] = about
        room -= _bytes(about)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups)}


def _index(tensors: Tensors, groups: Mapping[str, Tensors]) -> bytes:
    index = {
        "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
        "weight_map": {key: name for name, group in groups.items() for key in group},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _bytes(about: tuple[str, Sequence[int]]) -> int:
    return math.prod(about[1]) * DTYPES[about[0]].itemsize


def _with_aliases(layout: Layout, entries: Mapping[str, Entry]) -> list[FileTensor]:
    """The tensors of a checkpoint; a tied one under its further names too, if it has these."""
    by_name = {tensor.names: tensor for tensor in layout.disk}
    further = [
        replace(by_name[(name,)], key=key)
        for key, name in layout.aliases.items()
        if key in entries and (name,) in by_name
    ]
    return [*layout.disk, *further]


# --- writing ------------------------------------------------------------------------------------


@contextmanager
def _removed_if_it_fails(path: Path, names: Iterable[str]) -> Iterator[None]:
    """Remove the unfinished files of these names, and the folder if nothing else is in it.

    What is raised here is raised on all ranks, so that no rank is still writing.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except SpmdMoeError:  # a MeshError if it is not the same everywhere
        for name in names:
            (path / (name + UNFINISHED)).unlink(missing_ok=True)
        if names:
            with suppress(OSError):  # something else is in it
                for folder in made:
                    folder.rmdir()
        raise


def _make(path: Path, headers: Mapping[str, bytes]) -> int:
    """The files, of their full size, with nothing but their headers."""
    path.mkdir(parents=True, exist_ok=True)
    for name, header in headers.items():
        entries = entries_of(header, name, None)
        end = max((e.start + e.bytes for e in entries.values()), default=len(header))
        with open(path / (name + UNFINISHED), "wb") as file:
            file.write(header)
            file.truncate(end)
    return 0


def _writes(model: nn.Module, row: Obligation, mesh: MoEMesh) -> bool:
    """Of the ranks that hold the same part, one writes it."""
    tensor = tensor_of(model, row)
    stored = shard_group(tensor) is not None
    if isinstance(tensor, DTensor) and stored:
        mesh_of_tensor = tensor.device_mesh
        replicas = REPLICA in (mesh_of_tensor.mesh_dim_names or ())
        if replicas and mesh_of_tensor.get_local_rank(REPLICA):
            return False
    for k in row.placement:
        cut = isinstance(k.kind, Shard) or (stored and k.role in row.reduce_axes)
        if not cut and mesh[k.role].rank:
            return False
    return True


def _write(
    path: Path,
    entries: Mapping[str, Entry],
    tensors: Sequence[FileTensor],
    parts: Mapping[str, Part],
) -> int:
    files: dict[str, FileIO] = {}
    try:
        for tensor in tensors:
            entry = entries[tensor.key]
            mine = [parts[name] for name in tensor.names]
            box = tensor.box(mine[0])
            if box is None:
                continue
            if entry.file not in files:
                files[entry.file] = FileIO(path / (entry.file + UNFINISHED), write=True)
            shape = tensor.fine_shape(mine[0].whole)
            for piece in pieces(box, DTYPES[entry.dtype].itemsize):
                sizes = [size for _, size in piece]
                data = torch.empty(sizes, dtype=DTYPES[entry.dtype], device="cpu")
                for region, place in tensor.regions(mine, piece, data):
                    place.copy_(region)
                files[entry.file].write(entry, shape, piece, data)
        for file in files.values():
            file.to_disk()
    finally:
        for file in files.values():
            file.close()
    return sum(file.bytes for file in files.values())


def _finish(model: Any, path: Path, headers: Mapping[str, bytes], index: bytes | None) -> int:
    """The index, what transformers writes beside it, and last the files' own names."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        kinds = (kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        config.architectures = [next(kinds).__name__]
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)
    if index is not None:
        (path / (INDEX + UNFINISHED)).write_bytes(index)
    for name in (*headers, *([] if index is None else [INDEX])):
        os.replace(path / (name + UNFINISHED), path / name)
    return 0
