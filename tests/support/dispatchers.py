"""Every dispatcher by name, made for a mesh and a number of experts: one table for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.layer.dispatch import (
    AllGather,
    AllToAll,
    DedupAllToAll,
    Dispatcher,
    FixedCapacity,
    Local,
)

Make = Callable[[MoEMesh, int], Dispatcher[Any]]
ROOM = 240  # rows for each pair of ranks: enough for the cases of the tests

DISPATCHERS: dict[str, Make] = {
    "local": lambda mesh, num_experts: Local(mesh),
    "all_to_all": AllToAll,
    "dedup": DedupAllToAll,
    "all_gather": AllGather,
    "fixed": lambda mesh, num_experts: FixedCapacity(mesh, num_experts, ROOM),
}
SHARDED = [name for name in DISPATCHERS if name != "local"]  # on ep and etp of any size


def make_dispatcher(name: str, mesh: MoEMesh, num_experts: int) -> Dispatcher[Any] | None:
    """The dispatcher of this name; without a name None, so that the layer chooses."""
    return DISPATCHERS[name](mesh, num_experts) if name else None
