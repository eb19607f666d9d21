"""`hf.load`: each rank reads the bytes that it holds out of a checkpoint of transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from spmd_moe.core.errors import CheckpointError, explain, short_dtype
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE
from spmd_moe.core.validate import PathLike, check_path
from spmd_moe.hf.checkpoint_layout import (
    Layout,
    agreed,
    needed_layout,
    rows_and_parts,
    zero_buffers,
)
from spmd_moe.hf.element_map import FileTensor, Part
from spmd_moe.hf.safetensors_slices import (
    READABLE,
    DamagedFileError,
    FileIO,
    Folder,
    pieces,
    read_folder,
)
from spmd_moe.layer.router import Router
from spmd_moe.train.checkpoint.safetensors_file import DTYPES
from spmd_moe.train.obligations import Obligation

Rows: TypeAlias = Mapping[str, tuple[Obligation, Part]]


@torch.no_grad()
def load(
    model: nn.Module, folder: PathLike, mesh: MoEMesh, *, device: torch.device | str | None = None
) -> int:
    """Read a checkpoint of transformers into a swapped model. Every rank must call it.

    A model on the meta device is given memory first, and its buffers that are in no checkpoint,
    such as rotary tables, their values. Everything but the bytes themselves is checked before that,
    alike on all ranks.

    Args:
        model: A model that `swap` has changed; `parallelize` may have stored it since.
        folder: Has `model.safetensors`, or several files and their index.
        mesh: The mesh of the model.
        device: Of a model on meta; by default the CPU, or of a mesh of GPUs the current one.

    Returns:
        How many bytes of the files this rank has read.

    Raises:
        CheckpointError: Files that are not whole, or not of this model. The model is untouched.

    Example:
        >>> spmd_moe.hf.load(model, "Qwen3-30B-A3B", mesh)
    """
    path = check_path("hf.load", "folder", folder)
    layout = needed_layout("hf.load", model, mesh)
    found = _read_folder(path)
    if isinstance(found, Folder):
        rows = rows_and_parts(model, mesh)
        tensors = _tensors(layout, found)
        wrong = _wrong(found, tensors, layout, rows)
        said = hashlib.sha256(found.text()).hexdigest()
    else:
        said = wrong = found
    mesh.check_ranks_agree("hf.load", {"checkpoint": said})
    if wrong is not None or isinstance(found, str):
        raise CheckpointError(
            explain(
                "hf.load",
                f"{path.name!r} {wrong}",
                why="a checkpoint is of one model, and is loaded whole or not at all",
                fixes=["the folder that save_pretrained or hf.save wrote for this model"],
            )
        )
    if any(part.tensor.is_meta for _, part in rows.values()):
        _give_memory(model, _device(mesh) if device is None else device)
        rows = rows_and_parts(model, mesh)
    parts = {name: part for name, (_, part) in rows.items()}
    read = agreed("hf.load", path, mesh, lambda: _read(path, found, tensors, parts))
    for module in model.modules():
        if isinstance(module, Router):
            module.get_buffer("seen_E").zero_()  # choices that were made with other weights
    layout.source = found
    return read


def _read(
    path: Path, folder: Folder, tensors: Sequence[FileTensor], parts: Mapping[str, Part]
) -> int:
    files: dict[str, FileIO] = {}
    try:
        for tensor in tensors:
            entry = folder.entries[tensor.key]
            mine = [parts[name] for name in tensor.names]
            box = tensor.box(mine[0])
            if box is None:
                continue
            if entry.file not in files:
                files[entry.file] = FileIO(path / entry.file)
            shape = tensor.fine_shape(mine[0].whole)
            for piece in pieces(box, DTYPES[entry.dtype].itemsize):
                data = files[entry.file].read(entry, shape, piece)
                for region, values in tensor.regions(mine, piece, data):
                    region.copy_(values)
    finally:
        for file in files.values():
            file.close()
    return sum(file.bytes for file in files.values())


# --- what is wrong, if anything -----------------------------------------------------------------


def _read_folder(path: Path) -> Folder | str:
    if not path.is_dir():
        return "is not a folder"
    try:
        config = json.loads((path / "config.json").read_bytes())
        quantized = isinstance(config, dict) and config.get("quantization_config")
    except (OSError, ValueError, RecursionError):
        quantized = None  # the config is not needed
    if quantized:
        kind = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else ""
        return f"is quantized: {kind}; the layer computes with weights as they are"
    try:
        return read_folder(path)
    except DamagedFileError as error:
        return f"is damaged or foreign: {error.args[0]} {error.args[1]}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _tensors(layout: Layout, folder: Folder) -> Sequence[FileTensor]:
    """As transformers writes them; or, if all of these are there, as it has them in memory."""
    for tensors in (layout.disk, layout.memory):
        if all(tensor.key in folder.entries for tensor in tensors):
            return tensors
    return layout.disk


def _wrong(folder: Folder, tensors: Sequence[FileTensor], layout: Layout, rows: Rows) -> str | None:
    """What of a checkpoint does not fit the model; the same on all ranks."""
    keys = {tensor.key for tensor in tensors}
    missing = sorted(keys - folder.entries.keys())
    unknown = sorted(folder.entries.keys() - keys - layout.aliases.keys())
    if missing or unknown:
        lacks = f"lacks {_some(missing)}" if missing else ""
        has = f"has {_some(unknown)}, which the model has not" if unknown else ""
        return " and ".join(filter(None, (lacks, has)))
    for tensor in tensors:
        entry, (row, part) = folder.entries[tensor.key], rows[tensor.names[0]]
        have = f"{entry.file} has {tensor.key!r} as {entry.dtype}{list(entry.shape)}"
        shape = tensor.shape(part.whole)
        if entry.dtype not in READABLE:
            return f"{have}, a dtype that is not known here: {', '.join(READABLE)} are"
        dtype = DTYPES[entry.dtype]
        if entry.shape != shape:
            return f"{have}, the model as {list(shape)}"
        if dtype is not part.tensor.dtype and not (row.is_buffer and dtype.is_floating_point):
            return f"{have}, the model as {short_dtype(part.tensor.dtype)}: model.to({dtype})"
    return None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return ", ".join(map(repr, names[:3])) + more


# --- models without memory ----------------------------------------------------------------------


def _give_memory(model: nn.Module, device: torch.device | str) -> None:
    """Memory for all, and values for the buffers that are in no checkpoint."""
    without = [module for module in model.modules() if _meta_tables(module)]
    model.to_empty(device=device)
    init: Any = getattr(model, "_init_weights", None)
    for module in model.modules():
        if isinstance(module, Router):
            zero_buffers(module)
    for module in without:
        if init is not None and not module._parameters:
            init(module)  # transformers' own, which knows each of its modules


def _meta_tables(module: nn.Module) -> bool:
    names = module._non_persistent_buffers_set
    return any(b is not None and b.is_meta for n, b in module._buffers.items() if n in names)


def _device(mesh: MoEMesh) -> torch.device:
    if all(mesh[role].size == 1 for role in DENSE) or mesh.dense.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.dense.device_type, torch.accelerator.current_device_index())
