"""Checks of `save_checkpoint` and `load_checkpoint` before torch plans: ranks, names, the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from spmd_moe.core.errors import CheckpointError, MeshError, explain, short_dtype
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import DENSE
from spmd_moe.core.ranks_agree import check_ranks_agree
from spmd_moe.core.validate import describe_value
from spmd_moe.train.checkpoint.index import Index
from spmd_moe.train.checkpoint.on_disk import UNFINISHED, damaged, read_index
from spmd_moe.train.checkpoint.random_state import PREFIX as RANDOM
from spmd_moe.train.checkpoint.rank_parts import OPTIMIZER, Parts
from spmd_moe.train.checkpoint.strict_json import FLOAT, MAX_DEPTH, Json


def check_whole_world(where: str, mesh: MoEMesh, pipeline: ProcessGroup | None) -> None:
    """All ranks write into one folder, where two tensors of one name are parts of one tensor."""
    check_mesh(where, mesh)
    stages = 1 if pipeline is None else dist.get_world_size(pipeline)
    ranks = stages * math.prod(mesh[role].size for role in DENSE)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if ranks != world:
        raise MeshError(
            explain(
                where,
                f"the mesh has {ranks // stages} of {world} ranks"
                + ("" if pipeline is None else f", and the pipeline {stages} stages"),
                why="every rank takes part, and those outside the mesh have other tensors",
                fixes=["pipeline=group   # the ranks that have the other stages"],
            )
        )


def agree(
    where: str,
    model: nn.Module,
    mesh: MoEMesh,
    pipeline: ProcessGroup | None,
    settings: Mapping[str, object],
) -> None:
    if pipeline is None:
        mesh.check_ranks_agree(where, settings)
        return
    groups = [mesh[role].group for role in reversed(DENSE) if mesh[role].size > 1]
    device = next((p.device.type for p in model.parameters()), "cpu")
    check_ranks_agree(where, settings, [*groups, pipeline], device)


def check_name(path: Path) -> None:
    name = path.name
    if name.endswith(UNFINISHED) or not name or name == ".." or not name.isprintable():
        part = name.endswith(UNFINISHED)
        raise CheckpointError(
            explain(
                "save_checkpoint",
                f"{name!r} " + (f"ends in {UNFINISHED!r}" if part else "is no name of a folder"),
                why="names with that ending are of checkpoints that were never finished"
                if part
                else "a name has at least one character, all of them printable",
                fixes=[repr(name.removesuffix(UNFINISHED)) if part else "folder / '000100'"],
            )
        )


def json_of(extra: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """What comes back, and what is wrong: told now, not when all tensors are written."""
    given = dict(extra or {})
    try:
        copied: dict[str, Any] = json.loads(json.dumps(given))
        return copied, _changed_by_json(given)
    except (TypeError, ValueError, RecursionError) as error:
        return {}, str(error)


def _changed_by_json(value: Any, depth: int = 0) -> str:
    """What would come back as another thing: keys that become strings, tuples that become lists."""
    if isinstance(value, dict):
        odd = [describe_value(key) for key in value if not isinstance(key, str)]
        found = [f"{odd[0]} is a key, which JSON makes a string"] if odd else []
        found += [f"{FLOAT!r} is a key, which stands for a number"] if FLOAT in value else []
        value = value.values()
    elif isinstance(value, tuple):
        return f"{describe_value(value)} is in it, which JSON makes a list"
    else:
        found, value = [], value if isinstance(value, list) else ()
    if depth > MAX_DEPTH:
        return f"it is nested more than {MAX_DEPTH} deep"
    return next(filter(None, (*found, *(_changed_by_json(v, depth + 1) for v in value))), "")


def unstorable(wrong: str) -> CheckpointError:
    return CheckpointError(
        explain(
            "save_checkpoint",
            f"extra cannot be stored: {wrong}",
            why="what is not a tensor of the model or the optimizer is stored as JSON",
            fixes=["numbers, strings, lists, and dicts with strings as keys"],
        )
    )


def index_of_all(
    path: Path, model: nn.Module, mesh: MoEMesh, pipeline: ProcessGroup | None
) -> Index:
    """The index, if every rank reads the same; what is wrong with it, if that is the same."""
    index, wrong = None, None
    try:
        index = read_index(path)
        said = index.sha256[:16]
    except CheckpointError as error:
        wrong, said = error, str(error).partition("\n")[0][-100:]
    agree("load_checkpoint", model, mesh, pipeline, {"checkpoint": said})
    if index is None:
        assert wrong is not None
        raise wrong
    return index


def rest_of(path: Path, index: Index) -> dict[str, Json]:
    rest = index.rest
    keys = {"extra", "random", "optimizer"}
    if not isinstance(rest, dict) or rest.keys() != keys or not isinstance(rest["extra"], dict):
        raise damaged(path, "'rest' of its index must have " + ", ".join(sorted(keys)))
    return rest


def wanted_names(
    path: Path, parts: Parts, index: Index, weights_only: bool, all_names: bool
) -> set[str]:
    """The tensors of the checkpoint that have to be read, by this stage or by another."""
    there = {n for n in index.tensors if not n.startswith(RANDOM)}
    there = {n for n in there if not (weights_only and n.startswith(OPTIMIZER))}
    mine = {n for n, part in parts.items() if math.prod(part.shape) and not n.startswith(RANDOM)}
    missing, unknown = sorted(mine - there), sorted(there - mine) if all_names else []
    if missing or unknown:
        lacks = f"lacks {_some(missing)}" if missing else ""
        has = _has_unknown(unknown) if unknown else ""
        _refuse(path, " and ".join(filter(None, (lacks, has))), "they are not of one model")
    for name, part in parts.items():
        entry, dtype = index.tensors.get(name), part.tensor.dtype
        if entry is not None and (entry.shape != part.shape or entry.dtype is not dtype):
            _refuse(
                path,
                f"has {name!r} as {short_dtype(entry.dtype)}{list(entry.shape)}, the model as "
                f"{short_dtype(dtype)}{list(part.shape)}",
                "nothing is cut, padded or rounded on the way",
            )
    return there


def refuse_unknown(path: Path, names: list[str]) -> None:
    if names:
        _refuse(path, _has_unknown(names), "they are not of one model")


def _has_unknown(names: list[str]) -> str:
    return f"has {_some(names)}, which the model does not have"


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
