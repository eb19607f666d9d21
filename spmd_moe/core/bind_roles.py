"""Roles bound to the axes of a DeviceMesh that the program already has, under its own names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from spmd_moe.core.errors import MeshError, explain
from spmd_moe.core.mesh_degrees import check_degrees, expert_data_degree
from spmd_moe.core.placement import DENSE, EXPERT, Role
from spmd_moe.core.ranks_agree import check_ranks_agree

# The user's name for an axis, or the names of the adjacent axes that together play one role.
Names: TypeAlias = str | tuple[str, ...]


def bind_roles(
    where: str, which: str, mesh: DeviceMesh, asked: dict[Role, Names | int | None]
) -> dict[Role, Names]:
    """The names that each role is bound to, once they are known to cover the mesh exactly once."""
    have = mesh.mesh_dim_names or ()
    bound: dict[Role, Names] = {}
    seen: dict[str, Role] = {}
    for role, names in asked.items():
        if names is None:
            continue
        if isinstance(names, int):
            raise _binding_error(
                where,
                f"{role}={names} is a size, but the name of an axis is needed",
                f"the {which} mesh already has its sizes",
                [f"{role}={have[0]!r}" if have else f"leave {role} out"],
            )
        for name in (names,) if isinstance(names, str) else names:
            if name not in have:
                raise _binding_error(
                    where,
                    f"{role}={name!r} is not an axis of the {which} mesh, which has {list(have)}",
                    "a role is bound to an axis by its name",
                    [f"{role}={free!r}" for free in have if free not in seen][:1],
                )
            if name in seen:
                raise _binding_error(
                    where,
                    f"axis {name!r} is bound twice, to {seen[name]} and to {role}",
                    "two roles on one axis would be two placements on one axis",
                    [f"leave {role} out   # it then has size 1"],
                )
            seen[name] = role
        if isinstance(names, tuple):
            _check_adjacent(where, role, names, have)
        bound[role] = names[0] if isinstance(names, tuple) and len(names) == 1 else names
    for dim, name in enumerate(have):
        if mesh.size(dim) > 1 and name not in seen:
            raise _binding_error(
                where,
                f"axis {name!r} ({mesh.size(dim)} ranks) of the {which} mesh is bound to no role",
                "the ranks along it would hold tensors without a placement",
                [_proposed(name, have, list(asked), bound)],
            )
    return bound


def _proposed(
    name: str, have: Sequence[str], roles: Sequence[Role], bound: dict[Role, Names]
) -> str:
    """For an axis without a role: the role that its name names, else a role that is free."""
    named = [role for role in roles if role.name == name] or [r for r in roles if r.name in name]
    free = [role for role in (*named, *roles) if role not in bound]
    for role in named:
        if role in bound:  # one role on two adjacent axes: dp=("dp_replicate", "dp_shard")
            both = sorted((name, *_as_tuple(bound[role])), key=have.index)
            if _adjacent(both, have):
                return f"{role}={tuple(both)}"
    return f"{free[0]}={name!r}" if free else f"pass the slice of the mesh without {name!r}"


def _adjacent(names: Sequence[str], have: Sequence[str]) -> bool:
    first = have.index(names[0])
    return list(have[first : first + len(names)]) == list(names)


def _check_adjacent(where: str, role: Role, names: tuple[str, ...], have: Sequence[str]) -> None:
    if not names or not _adjacent(names, have):
        raise _binding_error(
            where,
            f"{role}={names} are not adjacent axes, in order, of {list(have)}",
            "only adjacent axes can be read as one",
            [f"{role}={tuple(have[:2])}"],
        )


def derive_expert(
    where: str, dense: DeviceMesh, bound: dict[Role, Names], given: dict[Role, Names | int | None]
) -> DeviceMesh:
    """The expert presentation of the dense ranks, which must be all ranks there are."""
    for role, size in given.items():
        if isinstance(size, str | tuple) or (role is EXPERT[0] and size is not None):
            raise _binding_error(
                where,
                f"{role}={size!r}, but there is no expert mesh whose axis that could be",
                "without expert=, ep and etp are sizes and edp follows from them",
                ["expert=the_mesh   # or leave edp out and write ep=2"],
            )
    ranks = dense.mesh
    if sorted(ranks.flatten().tolist()) != list(range(dist.get_world_size())):
        raise _binding_error(
            where,
            f"the dense mesh has {ranks.numel()} of {dist.get_world_size()} ranks",
            "new groups can be made only by all ranks together",
            ["expert=the_mesh   # the expert mesh of the same ranks, sliced from yours"],
        )
    ep, etp = (1 if size is None else cast(int, size) for size in (given[r] for r in EXPERT[1:]))
    check_ranks_agree(where, {"ep": ep, "etp": etp}, [dist.group.WORLD], dense.device_type)
    check_degrees(where, {"ep": ep, "etp": etp})
    edp = expert_data_degree(where, ep, etp, ranks.numel())
    ordered = in_role_order(dense, bound, DENSE)
    return DeviceMesh(
        dense.device_type, ordered.reshape(edp, ep, etp), mesh_dim_names=role_names(EXPERT)
    )


def in_role_order(mesh: DeviceMesh, bound: dict[Role, Names], roles: Sequence[Role]) -> Tensor:
    order = [name for role in roles if role in bound for name in _as_tuple(bound[role])]
    have = list(mesh.mesh_dim_names or ())
    order += [name for name in have if name not in order]
    return mesh.mesh.permute([have.index(name) for name in order])


def size_of_role(mesh: DeviceMesh, bound: dict[Role, Names], role: Role) -> int:
    have = mesh.mesh_dim_names or ()
    return math.prod(mesh.size(have.index(name)) for name in _as_tuple(bound.get(role, ())))


def _as_tuple(names: Names) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


def check_same_ranks(where: str, dense: DeviceMesh, expert: DeviceMesh) -> None:
    if sorted(dense.mesh.flatten().tolist()) != sorted(expert.mesh.flatten().tolist()):
        raise _binding_error(
            where,
            f"the {dense.size()} ranks of the dense mesh are not the {expert.size()} of expert=",
            "both present the same ranks",
            ["leave expert out and write ep=2   # the expert mesh is then derived"],
        )


def _binding_error(where: str, what: str, why: str, fixes: list[str]) -> MeshError:
    return MeshError(explain(where, what, why=why, fixes=fixes))


def role_names(roles: Sequence[Role]) -> tuple[str, ...]:
    return tuple(role.name for role in roles)


def own_names(roles: Sequence[Role]) -> dict[Role, Names]:
    return {role: role.name for role in roles}
