"""Save a training run on one layout, load it on any other, bit for bit.

    save_checkpoint(folder / "000100", model, mesh, optimizer, {"step": 100})
    extra = load_checkpoint(latest_checkpoint(folder), model, mesh, optimizer)

torch.distributed.checkpoint plans who writes and who reads what; `files.py` does both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from spmd_moe.core.errors import CheckpointError, MeshError, SpmdMoeError, explain, short_dtype
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import DENSE
from spmd_moe.core.validate import describe_value
from spmd_moe.train.checkpoint.files import INDEX, UNFINISHED, Index, Reader, Writer, read_index
from spmd_moe.train.checkpoint.state import (
    Parts,
    awaited_state,
    give_state,
    give_sums,
    model_parts,
    optimizer_parts,
    sums_awaited,
    sums_taken,
)

PathLike: TypeAlias = str | os.PathLike[str]


def save_checkpoint(
    path: PathLike,
    model: nn.Module,
    mesh: MoEMesh,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    asynchronous: bool = False,
) -> Future[None]:
    """Write a new checkpoint at `path`, which must not exist. Every rank must call it.

    `extra` is anything that JSON gives back as it was, the same on all ranks: the step, say. With
    `asynchronous` the tensors are copied and written while training goes on; `.result()` of what
    is returned waits for the end, and has to be called before the process group is destroyed.
    """
    path = Path(path)
    _check_whole_world("save_checkpoint", mesh)
    kept, wrong = _json_of(extra)
    told = {f"extra[{key!r}]": json.dumps(value, sort_keys=True) for key, value in kept.items()}
    there = {"path": path.name, "exists": path.exists()}
    mesh.check_ranks_agree("save_checkpoint", there | ({"extra": wrong} if wrong else told))
    _check_name(path)
    if wrong:
        raise _unstorable(wrong)
    if path.exists():
        raise CheckpointError(
            explain(
                "save_checkpoint",
                f"{path.name!r} exists",
                why="a checkpoint is never written over: it may be the only complete one",
                fixes=["a path of its own for each step, such as folder / '000100'"],
            )
        )
    parts = model_parts(model, mesh, sums_taken(model, mesh))
    groups = None
    if optimizer is not None:
        moments, groups = optimizer_parts(model, mesh, optimizer)
        parts |= moments
    rest = {"extra": kept, "optimizer": groups}
    if asynchronous:
        parts = {n: replace(p, tensor=p.tensor.to("cpu", copy=True)) for n, p in parts.items()}
        return _thread().submit(_write, path, parts, rest, _group_of_threads(mesh))
    done: Future[None] = Future()
    _write(path, parts, rest, None)
    done.set_result(None)
    return done


def load_checkpoint(
    path: PathLike,
    model: nn.Module,
    mesh: MoEMesh,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Read a checkpoint of any layout into this model and optimizer; returns `extra`.

    Everything but the bytes themselves is checked before the first of them is copied. Every rank
    must call it.
    """
    path = Path(path)
    _check_whole_world("load_checkpoint", mesh)
    index = _index_of_all(path, mesh)
    sums = sums_awaited(model, mesh)
    parts = model_parts(model, mesh, sums)
    if optimizer is not None:
        more, states, settings = awaited_state(model, mesh, optimizer, index.rest["optimizer"])
        parts |= more
    _check(path, parts, index, weights_only=optimizer is None)
    _alike(
        "load_checkpoint",
        path,
        lambda: dcp.load(
            dict(parts),
            storage_reader=Reader(path, index),
            planner=_LoadPlanner(),
            no_dist=not dist.is_initialized(),
        ),
    )
    give_sums(model, mesh, sums)
    if optimizer is not None:
        give_state(optimizer, states, settings)
    extra: dict[str, Any] = index.rest["extra"]
    return extra


def latest_checkpoint(folder: PathLike) -> Path | None:
    """The complete checkpoint whose name comes last, `step_1000` after `step_900`; None of none."""
    complete = (p for p in Path(folder).glob(f"*/{INDEX}") if p.parent.suffix != UNFINISHED)
    return max((p.parent for p in complete), key=_in_numbers, default=None)


def _in_numbers(path: Path) -> tuple[list[str | int], str]:
    """For sorting: digits in a name count as numbers, whatever their width."""
    parts: list[str | int] = list(re.split("([0-9]+)", path.name))
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


# --- writing ------------------------------------------------------------------------------------


def _write(path: Path, parts: Parts, rest: Any, group: ProcessGroup | None) -> None:
    writer = Writer(path, rest)
    try:
        _alike(
            "save_checkpoint",
            path,
            lambda: dcp.save(
                dict(parts),
                storage_writer=writer,
                planner=_SavePlanner(flatten_state_dict=False),
                process_group=group,
                no_dist=not dist.is_initialized(),
            ),
        )
    finally:  # it is gone already if all went well
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(writer.folder, ignore_errors=True)


@cache
def _thread() -> ThreadPoolExecutor:
    """One, so that all ranks write their checkpoints in the same order."""
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


_GROUPS: dict[ProcessGroup, ProcessGroup] = {}


def _group_of_threads(mesh: MoEMesh) -> ProcessGroup | None:
    """A group for the threads that write: in that of training, the two would mix up."""
    if not dist.is_initialized():
        return None
    training = dist.group.WORLD
    assert training is not None
    if training not in _GROUPS:
        _GROUPS.clear()
        _GROUPS[training] = dist.new_group(backend="gloo")
    return _GROUPS[training]


# --- planning: torch's, told where our tensors are --------------------------------------------


@final
class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


@final
class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: Parts, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        plan = []
        for name, part in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            plan += create_read_items_for_chunk_list(name, stored, part.chunks())
        return LoadPlan(plan)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


# --- refusals ---------------------------------------------------------------------------------


def _check_whole_world(where: str, mesh: MoEMesh) -> None:
    """All ranks write into one folder, where two tensors of one name are parts of one tensor."""
    check_mesh(where, mesh)
    ranks = math.prod(mesh[role].size for role in DENSE)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if ranks != world:
        raise MeshError(
            explain(
                where,
                f"the mesh has {ranks} of {world} ranks",
                why="another mesh has tensors of the same names, as other stages of a pipeline do: "
                "in one checkpoint they would be taken for the same",
                fixes=["torch.save(model.state_dict(), path)   # each rank to a path of its own"],
            )
        )


def _check_name(path: Path) -> None:
    if path.name.endswith(UNFINISHED):
        raise CheckpointError(
            explain(
                "save_checkpoint",
                f"{path.name!r} ends in {UNFINISHED!r}",
                why="so does the name of a checkpoint that was never finished, which is not loaded",
                fixes=[f"{path.name.removesuffix(UNFINISHED)!r}"],
            )
        )


def _json_of(extra: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """What comes back, and what is wrong: told now, not when all tensors are written."""
    given = dict(extra or {})
    try:
        copied: dict[str, Any] = json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        return {}, str(error)
    return copied, _changed_by_json(given)


def _changed_by_json(value: Any) -> str:
    """What would come back as another thing: keys that become strings, tuples that become lists."""
    if isinstance(value, dict):
        odd = [describe_value(key) for key in value if not isinstance(key, str)]
        found = [f"{odd[0]} is a key, which JSON makes a string"] if odd else []
        value = value.values()
    elif isinstance(value, tuple):
        return f"{describe_value(value)} is in it, which JSON makes a list"
    else:
        found, value = [], value if isinstance(value, list) else ()
    return next(filter(None, (*found, *map(_changed_by_json, value))), "")


def _unstorable(wrong: str) -> CheckpointError:
    return CheckpointError(
        explain(
            "save_checkpoint",
            f"extra cannot be stored: {wrong}",
            why="what is not a tensor of the model or the optimizer is stored as JSON",
            fixes=["numbers, strings, lists, and dicts with strings as keys"],
        )
    )


def _index_of_all(path: Path, mesh: MoEMesh) -> Index:
    """The index, if every rank reads the same; what is wrong with it, if that is the same."""
    index, wrong = None, None
    try:
        index = read_index(path)
        said = hashlib.sha256((path / INDEX).read_bytes()).hexdigest()[:16]
    except CheckpointError as error:
        wrong, said = error, str(error).partition("\n")[0][-100:]
    mesh.check_ranks_agree("load_checkpoint", {"checkpoint": said})
    if index is None:
        assert wrong is not None
        raise wrong
    return index


def _check(path: Path, parts: Parts, index: Index, *, weights_only: bool) -> None:
    """Refuse the checkpoint of another model."""
    there = {n for n in index.tensors if not (weights_only and n.startswith("optimizer:"))}
    missing, unknown = sorted(parts.keys() - there), sorted(there - parts.keys())
    if missing or unknown:
        lacks = f"lacks {_some(missing)}" if missing else ""
        has = f"has {_some(unknown)}, which the model has not" if unknown else ""
        _refuse(path, " and ".join(filter(None, (lacks, has))), "they are not of one model")
    for name, part in parts.items():
        entry, dtype = index.tensors[name], part.tensor.dtype
        if entry.shape != part.shape or entry.dtype is not dtype:
            _refuse(
                path,
                f"has {name!r} as {short_dtype(entry.dtype)}{list(entry.shape)}, the model as "
                f"{short_dtype(dtype)}{list(part.shape)}",
                "nothing is cut, padded or rounded on the way",
            )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")


def _refuse(path: Path, what: str, why: str) -> NoReturn:
    raise CheckpointError(
        explain(
            "load_checkpoint",
            f"{path.name!r} {what}",
            why=why,
            fixes=["the model and dtype that were saved"],
        )
    )


def _alike(where: str, path: Path, plan: Callable[[], object]) -> None:
    """Let torch plan and do it. What goes wrong on some ranks is one error on all."""
    try:
        with warnings.catch_warnings():
            if not dist.is_initialized():  # torch warns of what is no mistake here
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            plan()
    except CheckpointException as failed:
        rank = min(failed.failures)
        error = failed.failures[rank][0]
        if isinstance(error, SpmdMoeError):
            raise error from None
        if not isinstance(error, OSError):
            raise failed
        raise CheckpointError(
            explain(
                where,
                f"{path.name!r}, on rank {rank}: {error.strerror or error}",
                why="the disk refused; checkpoints that were complete are as they were",
                fixes=["another folder, or room on this one"],
            )
        ) from error
