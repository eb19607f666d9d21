"""The states of torch's default generators, one row for each rank.

    random:cpu    [ranks, 5056] of uint8
    random:cuda   [ranks, 16]

On the layout that was saved each rank gets its own state back, so that dropout and jitter continue
as if the run had never stopped. On another layout the saved states belong to no rank: every rank is
seeded with a digest of the checkpoint and of its place on dp and cp. Ranks that differ only on tp,
ep or etp get the same seed, because they may hold the same tokens and then have to draw the same
numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DENSE, DP, EXPERT
from spmd_moe.train.checkpoint.index import Index
from spmd_moe.train.checkpoint.rank_parts import Part, Parts
from spmd_moe.train.checkpoint.strict_json import Json

PREFIX = "random:"


def random_parts(model: nn.Module) -> Parts:
    """The states of this rank's generators: of the CPU, and of the device of the model."""
    rank, ranks = _place()
    states = {name: module.get_rng_state() for name, module in _modules(model).items()}
    return {
        PREFIX + name: Part(state[None], (ranks, state.numel()), (rank, 0))
        for name, state in states.items()
    }


def layout_of(mesh: MoEMesh) -> Json:
    """What must be the same for a rank to be the rank that it was."""
    degrees = {str(role): mesh[role].size for role in (*DENSE, *EXPERT)}
    return degrees | {"ranks": _place()[1]}


def awaited_random(model: nn.Module, mesh: MoEMesh, index: Index, saved: Json) -> Parts:
    """Room for the states of this rank; none where the layout is another."""
    parts = random_parts(model)
    fits = saved == layout_of(mesh) and all(
        name in index.tensors and index.tensors[name].shape == part.shape
        for name, part in parts.items()
    )
    return parts if fits else {}


def is_state(name: str, state: Tensor) -> bool:
    """torch accepts it. Tried on a generator of its own, for the CPU: others take any bytes."""
    if name != PREFIX + "cpu":
        return True
    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        return False
    return True


def give_random(model: nn.Module, mesh: MoEMesh, index: Index, loaded: Parts) -> None:
    """Set the generators to the states that were loaded; without any, seed them by place."""
    for name, module in _modules(model).items() if loaded else ():
        module.set_rng_state(loaded[PREFIX + name].tensor[0])
    if not loaded:
        place = f"{index.sha256} dp {mesh[DP].rank} cp {mesh[CP].rank}"
        digest = hashlib.sha256(place.encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _modules(model: nn.Module) -> dict[str, Any]:
    """What has `get_rng_state` and `set_rng_state`, by the type of the device."""
    types = {parameter.device.type for parameter in model.parameters()} - {"cpu", "meta"}
    modules: dict[str, Any] = {"cpu": torch}
    return modules | {name: torch.get_device_module(name) for name in sorted(types)}


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
