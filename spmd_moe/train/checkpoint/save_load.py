"""Save a training run on one layout, load it on any other, bit for bit.

    save_checkpoint(folder / "000100", model, mesh, optimizer, {"step": 100})
    extra = load_checkpoint(latest_checkpoint(folder), model, mesh, optimizer)

torch.distributed.checkpoint plans which rank writes and reads what; `on_disk.py` does both.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import ProcessGroup

from spmd_moe.core.errors import CheckpointError, SpmdMoeError
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE
from spmd_moe.core.validate import PathLike, check_path
from spmd_moe.train.checkpoint.check_before_plan import (
    agree,
    check_name,
    check_whole_world,
    index_of_all,
    json_of,
    refuse_unknown,
    rest_of,
    unstorable,
    wanted_names,
)
from spmd_moe.train.checkpoint.on_disk import (
    INDEX,
    UNFINISHED,
    Reader,
    Writer,
    damaged,
    read_index,
)
from spmd_moe.train.checkpoint.planners import LoadParts, SaveParts, run_plan
from spmd_moe.train.checkpoint.random_state import (
    awaited_random,
    give_random,
    is_state,
    layout_of,
    random_parts,
)
from spmd_moe.train.checkpoint.rank_parts import (
    Parts,
    awaited_state,
    give_state,
    give_sums,
    model_parts,
    optimizer_parts,
    sums_awaited,
    sums_taken,
)
from spmd_moe.train.checkpoint.safetensors_file import check_storable
from spmd_moe.train.checkpoint.strict_json import Json


def save_checkpoint(
    path: PathLike,
    model: nn.Module,
    mesh: MoEMesh,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    asynchronous: bool = False,
    pipeline: ProcessGroup | None = None,
    prefix: str = "",
) -> Future[None]:
    """Write a new checkpoint, which loads on any other layout.

    The states of the default random number generators are saved too. The checkpoint appears under
    its name when it is complete. If two jobs save to one name, one of the saves succeeds and the
    other raises.

    Args:
        path: The folder to make. Its parents are made where they are missing.
        model: The model, or this rank's stage of a pipeline.
        mesh: The ranks that have `model`: all ranks, or those of one stage.
        optimizer: Its state and the settings of its groups are saved. Default: weights only.
        extra: Values that JSON can store, the same on all ranks: the step, for example.
        asynchronous: Copy the tensors and write them in a thread while training continues. Call
            `.result()` of the returned future before the process group is destroyed.
        pipeline: The group of the ranks that have the other stages, as for `clip_grad_norm_`.
        prefix: Put before every name of this rank's model. Required where two stages of a pipeline
            have parameters of one name.

    Returns:
        A future. It is done on return unless `asynchronous`.

    Raises:
        CheckpointError: The path exists, the disk refuses, or something cannot be stored.
        MeshError: The ranks disagree, or the mesh and the pipeline are not all ranks.

    Example:
        >>> import tempfile
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> from spmd_moe import latest_checkpoint, load_checkpoint, save_checkpoint
        >>> folder, mesh = tempfile.mkdtemp(), MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> _ = save_checkpoint(f"{folder}/step_1", layer, mesh, extra={"step": 1})
    """
    where, path = "save_checkpoint", check_path("save_checkpoint", "path", path)
    check_whole_world(where, mesh, pipeline)
    kept, unfit = json_of(extra)
    told = {f"extra[{key!r}]": json.dumps(value, sort_keys=True) for key, value in kept.items()}
    call = {"path": repr(path.name), "optimizer": optimizer is not None}
    agree(where, model, mesh, pipeline, call | ({"extra": unfit} if unfit else told))
    check_name(path)
    if unfit:
        raise unstorable(unfit)
    parts, groups, wrong = Parts(), None, None
    sums = sums_taken(model, mesh)
    try:
        parts = model_parts(model, mesh, sums, prefix)
        if optimizer is not None:
            moments, groups = optimizer_parts(model, mesh, optimizer, prefix)
            parts |= moments
        check_storable((name, part.tensor.dtype) for name, part in parts.items())
    except SpmdMoeError as error:
        wrong = _here_or_later(error, pipeline)
    parts |= random_parts(model)
    rest = {"extra": kept, "random": layout_of(mesh)}
    first = all(mesh[role].rank == 0 for role in DENSE)
    planner = SaveParts(_stage(pipeline), groups if first else None, wrong)
    writer = Writer(path, lambda: rest | {"optimizer": planner.groups})
    if asynchronous:
        parts = {n: replace(p, tensor=p.tensor.to("cpu", copy=True)) for n, p in parts.items()}
        return _thread().submit(_write, writer, planner, parts, _group_of_threads())
    done: Future[None] = Future()
    _write(writer, planner, parts, None)
    done.set_result(None)
    return done


def load_checkpoint(
    path: PathLike,
    model: nn.Module,
    mesh: MoEMesh,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    pipeline: ProcessGroup | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """Read a checkpoint of any layout into this model and optimizer. Every rank must call it.

    Everything except the bytes of the tensors is checked before the first tensor is changed. If
    their bytes turn out to be damaged, the model is changed in part: load another checkpoint.

    Args:
        path: The folder of the checkpoint.
        model: The model, or this rank's stage of a pipeline.
        mesh: The ranks that have `model`.
        optimizer: Gets the state and the settings that were saved. With it, the run continues, so
            the random number generators are set too: to the states that were saved where the
            layout is the same, else by this rank's place on dp and cp. Default: weights only.
        pipeline: The group of the ranks that have the other stages.
        prefix: Put before every name of this rank's model, as when it was saved.

    Returns:
        `extra` as it was saved.

    Raises:
        CheckpointError: The checkpoint is damaged, or it is of another model.
        MeshError: The ranks see different checkpoints.

    Example:
        >>> import tempfile
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> from spmd_moe import latest_checkpoint, load_checkpoint, save_checkpoint
        >>> folder, mesh = tempfile.mkdtemp(), MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> _ = save_checkpoint(f"{folder}/step_1", layer, mesh, extra={"step": 1})
        >>> load_checkpoint(f"{folder}/step_1", layer, mesh)
        {'step': 1}
    """
    where, path = "load_checkpoint", check_path("load_checkpoint", "path", path)
    check_whole_world(where, mesh, pipeline)
    index = index_of_all(path, model, mesh, pipeline)
    rest = rest_of(path, index)
    parts, random, wrong, settings = Parts(), Parts(), None, list[Json]()
    sums = sums_awaited(model, mesh)
    states: dict[nn.Parameter, dict[str, Any]] = {}
    try:
        parts = model_parts(model, mesh, sums, prefix)
        if optimizer is not None:
            more, states, settings = awaited_state(
                model, mesh, optimizer, rest["optimizer"], prefix
            )
            random = awaited_random(model, mesh, index, rest["random"])
            parts |= more | random
        wanted = wanted_names(path, parts, index, optimizer is None, pipeline is None)
    except SpmdMoeError as error:
        wrong, wanted = _here_or_later(error, pipeline), set()
    planner = LoadParts(wanted, lambda names: refuse_unknown(path, names), wrong)
    run_plan(
        where,
        path,
        lambda: dcp.load(
            dict(parts),
            storage_reader=Reader(path, index),
            planner=planner,
            no_dist=not dist.is_initialized(),
        ),
    )
    if not all(is_state(name, part.tensor[0]) for name, part in random.items()):
        raise damaged(path, "it has a state of a random number generator that torch refuses")
    give_sums(model, mesh, sums)
    if optimizer is not None:
        give_state(optimizer, states, settings)
        give_random(model, mesh, index, random)
    extra: dict[str, Any] = rest["extra"]
    return extra


def latest_checkpoint(folder: PathLike) -> Path | None:
    """The complete checkpoint whose name comes last, `step_1000` after `step_900`.

    Skips, with a warning, one whose index or whose files' sizes show that it would not load.

    Args:
        folder: The folder of the checkpoints.

    Returns:
        The path of the checkpoint, or None where there is none.

    Example:
        >>> import tempfile
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> from spmd_moe import latest_checkpoint, load_checkpoint, save_checkpoint
        >>> folder, mesh = tempfile.mkdtemp(), MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> _ = save_checkpoint(f"{folder}/step_1", layer, mesh, extra={"step": 1})
        >>> latest_checkpoint(folder).name
        'step_1'
    """
    root = check_path("latest_checkpoint", "folder", folder)
    complete = (p for p in root.glob(f"*/{INDEX}") if p.parent.suffix != UNFINISHED)
    for path in sorted((p.parent for p in complete), key=_in_numbers, reverse=True):
        try:
            read_index(path)
        except CheckpointError as error:
            said = str(error).partition("\n")[0].removeprefix("load_checkpoint: ")
            warnings.warn(f"latest_checkpoint: skipped {said}", stacklevel=2)
            continue
        return path
    return None


def _in_numbers(path: Path) -> tuple[list[str | int], str]:
    """For sorting: digits in a name count as numbers, with or without leading zeros."""
    parts: list[str | int] = list(re.split("([0-9]+)", path.name))
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


# --- writing ----------------------------------------------------------------------------------


def _write(writer: Writer, planner: SaveParts, parts: Parts, group: ProcessGroup | None) -> None:
    try:
        run_plan(
            "save_checkpoint",
            writer.path,
            lambda: dcp.save(
                dict(parts),
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=not dist.is_initialized(),
            ),
        )
    finally:
        if writer.folder is not None:  # renamed, and so gone, if all went well
            shutil.rmtree(writer.folder, ignore_errors=True)


@cache
def _thread() -> ThreadPoolExecutor:
    """One, so that all ranks write their checkpoints in the same order."""
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


_GROUPS: dict[ProcessGroup, ProcessGroup] = {}


def _group_of_threads() -> ProcessGroup | None:
    """A group for the threads that write: in training's own group the messages would mix."""
    if not dist.is_initialized():
        return None
    training = dist.group.WORLD
    assert training is not None
    if training not in _GROUPS:
        _GROUPS.clear()
        _GROUPS[training] = dist.new_group(backend="gloo")
    return _GROUPS[training]


def _stage(pipeline: ProcessGroup | None) -> int:
    return 0 if pipeline is None else dist.get_rank(pipeline)


def _here_or_later(error: SpmdMoeError, pipeline: ProcessGroup | None) -> SpmdMoeError:
    """Raise what all ranks find alike at once; the stages of a pipeline tell each other first."""
    if pipeline is None:
        raise error
    return error
