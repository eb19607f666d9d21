"""How a parameter is stored: the axes that reduce its gradient joined into one, then the others.

    w1_eFD        edp 4: R               ep 2: S(0)   etp 2: S(1)
    FSDP          shard 4: Strided(0)    ep 2: S(0)   etp 2: S(1)
    HSDP          replica 2 x shard 2: Replicate, Strided(0), ...

FSDP cuts a parameter over the joined axis, which is there for every parameter that owes anything.
The device meshes made here are for storage; they present the same ranks once more. Groups are new
only on the joined axes; on the others they are those of the layer's mesh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch.distributed as dist
from spmd_types import Shard
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as StoredShard

from spmd_moe.core.errors import ConfigError, MeshError, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE, EXPERT, Placement, Role
from spmd_moe.train.obligations import Obligation

REPLICA, SHARD = "replica", "shard"


@final
@dataclass(frozen=True, slots=True)
class Store:
    """The axes that some parameters are stored on."""

    mesh: DeviceMesh  # replica (of HSDP alone), shard, and the axes of `roles`
    data: DeviceMesh  # replica and shard alone: the mesh that FSDP is given
    roles: tuple[Role, ...]  # the other axes that have more than one rank
    shards: int

    def typed(self, row: Obligation, local: Tensor) -> Tensor:
        """What this rank computes with, as a part of the whole over the axes of `roles`."""
        if not self.roles:
            return local
        axes = DENSE if row.presentation == "dense" else EXPERT
        placements = [row.stored[axes.index(role)] for role in self.roles]
        names = (self.mesh.mesh_dim_names or ())[-len(self.roles) :]
        return DTensor.from_local(local, self.mesh[names], placements, run_check=False)


@final
class Stores:
    """The stores of a model's parameters, made once for each set of reduced axes."""

    def __init__(self, mesh: MoEMesh, replicas: int) -> None:
        self._mesh, self._replicas = mesh, replicas
        self._made: dict[object, Store] = {}
        if mesh.ranks("dense").numel() != dist.get_world_size():
            raise MeshError(
                explain(
                    "parallelize",
                    f"the mesh has {mesh.ranks('dense').numel()} of {dist.get_world_size()} ranks",
                    why="new groups can be made only by all ranks together",
                    fixes=["reduce_gradients(model, mesh)   # needs no new groups"],
                )
            )

    def __getitem__(self, row: Obligation) -> Store:
        key = row.presentation, row.reduce_axes
        if key not in self._made:
            self._made[key] = self._make(row)
        return self._made[key]

    def _make(self, row: Obligation) -> Store:
        mesh, axes = self._mesh, DENSE if row.presentation == "dense" else EXPERT
        reduced = row.reduce_axes
        if not reduced:
            raise ConfigError(
                explain(
                    "parallelize",
                    f"{row.name!r} is declared {row.placement}, R on no axis",
                    why="FSDP shares a parameter out over the ranks that each have all of it",
                    fixes=["reduce_gradients(model, mesh)   # without FSDP"],
                )
            )
        copies, replicas = math.prod(mesh[role].size for role in reduced), self._replicas
        if replicas < 1 or copies % replicas:
            fit = max(d for d in range(1, copies + 1) if copies % d == 0 and d <= max(replicas, 1))
            raise ConfigError(
                explain(
                    "parallelize",
                    f"replicas={replicas} does not divide the {copies} ranks that have the same "
                    f"of {row.name!r} ({' x '.join(map(str, reduced))})",
                    why="every replica has the same number of shards",
                    fixes=[f"replicas={fit}   # the nearest that fits this parameter"],
                )
            )
        rest = tuple(role for role in axes if role not in reduced and mesh[role].size > 1)
        ranks = mesh.ranks(row.presentation)
        ranks = ranks.permute([axes.index(role) for role in (*reduced, *_others(axes, reduced))])
        sizes = [copies // replicas, *(mesh[role].size for role in rest)]
        names = (SHARD, *(role.name for role in rest))
        if replicas > 1:
            sizes, names = [replicas, *sizes], (REPLICA, *names)
        laid_out = ranks.reshape(sizes)
        groups = [_new_group(laid_out, dim) for dim in range(len(names) - len(rest))]
        groups += [mesh[role].group for role in rest]
        device_type = mesh.dense.device_type
        stored = DeviceMesh.from_group(groups, device_type, laid_out, mesh_dim_names=names)
        data = stored[REPLICA, SHARD] if replicas > 1 else stored[SHARD]
        return Store(stored, data, rest, copies // replicas)


def _new_group(ranks: Tensor, dim: int) -> ProcessGroup:
    """A group for FSDP alone: its gathers then run beside what the layer sends on its own axes."""
    members = ranks.movedim(dim, -1).reshape(-1, ranks.size(dim)).tolist()
    if len(members) == 1:
        return dist.group.WORLD  # type: ignore[return-value]  # torch types it as an optional
    mine: ProcessGroup = dist.new_subgroups_by_enumeration(members)[0]
    return mine


def _others(axes: tuple[Role, ...], reduced: tuple[Role, ...]) -> list[Role]:
    return [role for role in axes if role not in reduced]


def shard_dim(row: Obligation, shards: int) -> int:
    """The dim that FSDP cuts: the first that divides; of those that do not, dim 0 alone can.

    A dim 0 that the type has cut already is not cut unevenly once more: the parts of a whole
    would then not be the same on every layout.
    """
    sizes = row.local_shape
    for dim, size in enumerate(sizes):
        if size % shards == 0:
            return dim
    if sizes and not any(isinstance(s, StoredShard) and s.dim == 0 for s in row.stored):
        return 0
    whole, ways = (row.global_shape[0], row.global_shape[0] // sizes[0]) if sizes else (1, 1)
    step = ways * shards
    raise ConfigError(
        explain(
            "parallelize",
            f"{row.name!r} is {list(sizes)} on each rank, which no dim lets {shards} shards have "
            "equal parts of",
            why="FSDP shares one dim out evenly",
            fixes=[f"a dim 0 of {max(round(whole / step), 1) * step} in place of {whole}"],
        )
    )


def shard_group(parameter: Tensor) -> ProcessGroup | None:
    """The ranks that have the other shards of a parameter; None where it is not cut by FSDP."""
    if not isinstance(parameter, DTensor):
        return None
    names = parameter.device_mesh.mesh_dim_names or ()
    if SHARD not in names or parameter.placements[names.index(SHARD)].is_replicate():
        return None
    return parameter.device_mesh.get_group(SHARD)


def local(tensor: Tensor) -> Tensor:
    """What lies on this rank, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_by_others(placement: Placement, mesh: MoEMesh, tensor: Tensor) -> bool:
    """Not made by `parallelize`, so it is unknown which part of the whole this is."""
    if not isinstance(tensor, DTensor) or shard_group(tensor) is not None:
        return False
    _, size = _part(placement, mesh, tensor)
    return list(local(tensor).shape) != size


def settled(model: nn.Module) -> nn.Module:
    """The model with its stored parameters: after a forward alone FSDP keeps the others."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def whole_shape(placement: Placement, mesh: MoEMesh, tensor: Tensor) -> tuple[int, ...]:
    """Of a parameter or buffer, before any rank takes its part; what is stored knows it."""
    shape = list(tensor.shape)
    for k in placement:
        if isinstance(k.kind, Shard) and not isinstance(tensor, DTensor):
            shape[k.kind.dim] *= mesh[k.role].size
    return tuple(shape)


def place_in_whole(placement: Placement, mesh: MoEMesh, tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part of a parameter or buffer begins, in each dim."""
    start, size = _part(placement, mesh, tensor)
    group = shard_group(tensor)
    if group is not None and isinstance(tensor, DTensor):
        cut = tensor.placements[(tensor.device_mesh.mesh_dim_names or ()).index(SHARD)]
        dim = cut.dim  # type: ignore[attr-defined]  # a plain shard or a strided one
        chunk = -(-size[dim] // group.size())
        start[dim] += min(group.rank() * chunk, size[dim])
    return tuple(start)


def _part(placement: Placement, mesh: MoEMesh, tensor: Tensor) -> tuple[list[int], list[int]]:
    """Where this rank's part begins and how large it is, before `parallelize` cuts it once more."""
    size = list(whole_shape(placement, mesh, tensor))
    start = [0] * len(size)
    for k in placement:
        if isinstance(k.kind, Shard):
            dim, axis = k.kind.dim % len(size), mesh[k.role]
            size[dim] //= axis.size
            start[dim] += axis.rank * size[dim]
    return start, size
