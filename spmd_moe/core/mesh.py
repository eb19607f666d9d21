"""The same ranks presented twice: the dense mesh (dp, cp, tp), the expert mesh (edp, ep, etp).

8 ranks as dp 2 x tp 4, and the same ranks as edp 2 x ep 2 x etp 2:

    dense    tp 0  1  2  3        expert    etp 0  1
    dp 0        0  1  2  3        ep 0          0  1    (edp 0)
    dp 1        4  5  6  7        ep 1          2  3
                                  ep 0          4  5    (edp 1)
                                  ep 1          6  7

`mesh[TP]` is an `Axis`: its size, this rank's place on it, and its process group. Groups are made
or fetched once, in the constructor. An axis of size 1 is an axis like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, final

import torch.distributed as dist
from spmd_types import MeshAxis
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spmd_moe.core.bind_roles import (
    Names,
    bind_roles,
    check_same_ranks,
    derive_expert,
    in_role_order,
    own_names,
    role_names,
    size_of_role,
)
from spmd_moe.core.check_gpu import (
    check_capability,
    check_device_of_rank,
    settings_of_device,
)
from spmd_moe.core.errors import MeshError, explain, plural
from spmd_moe.core.mesh_degrees import (
    check_degrees,
    check_dense,
    check_device_type,
    expert_data_degree,
    refuses_other_axes,
    tell_axes,
)
from spmd_moe.core.placement import DENSE, EXPERT, Role
from spmd_moe.core.ranks_agree import check_ranks_agree
from spmd_moe.core.validate import check_instance


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh, as this rank sees it.

    Attributes:
        role: The role of the axis, such as `TP`.
        name: The user's own name of the axis.
        size: The number of its ranks.
        rank: The index of this rank on the axis.
        group: The process group of the axis.

    Example:
        >>> from spmd_moe import TP, MoEMesh
        >>> axis = MoEMesh.single()[TP]
        >>> print(axis, axis.rank)
        axis 'tp' (1 rank) 0
    """

    role: Role
    name: str
    size: int
    rank: int
    group: ProcessGroup

    def __deepcopy__(self, memo: object) -> Axis:
        """A copy of a layer is on the same axis: a process group cannot be copied."""
        return self

    def __copy__(self) -> Axis:
        return self

    def __reduce__(self) -> NoReturn:
        raise _not_pickled(self)

    def __str__(self) -> str:
        return f"axis '{self.name}' ({plural(self.size, 'rank')})"


@final
class MoEMesh:
    """The same ranks as a dense mesh (dp, cp, tp) and as an expert mesh (edp, ep, etp).

    Build it with `init`, `from_device_mesh` or `single`. `mesh[TP]` is the axis of a role.

    Raises:
        MeshError: Degrees do not multiply to the number of ranks, differ between ranks, or name
            axes that do not exist.

    Example:
        >>> import torch.distributed as dist
        >>> from spmd_moe import EP, MoEMesh
        >>> dist.init_process_group("fake", rank=3, world_size=8)
        >>> mesh = MoEMesh.init("cpu", dp=2, tp=4, ep=4)
        >>> print(mesh, mesh[EP].rank)
        MoEMesh(dp 2 x cp 1 x tp 4 = edp 2 x ep 4 x etp 1) 3
    """

    def __init__(
        self, axes: Iterable[Axis], presentations: tuple[tuple[DeviceMesh, Tensor], ...]
    ) -> None:
        self._axes = {axis.role: axis for axis in axes}
        self._presentations = presentations
        self.tell_axes: tuple[Role, ...] = ()
        if presentations:
            (_, dense), (_, expert) = presentations
            self.tell_axes = tell_axes(dense.flatten(0, 1).tolist(), expert.flatten(1).tolist())

    @staticmethod
    @refuses_other_axes("MoEMesh.init")
    def init(
        device_type: str, *, dp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1
    ) -> MoEMesh:
        """Lay the ranks of the default process group out as a new mesh; edp follows.

        Every rank must call it, with the same degrees.
        """
        where = "MoEMesh.init"
        check_device_type(where, device_type)
        if not dist.is_initialized():
            raise MeshError(
                explain(
                    where,
                    "there is no default process group, and a mesh of several ranks needs one",
                    why="the ranks have to know of each other",
                    fixes=[
                        "torch.distributed.init_process_group()   # before it, under torchrun",
                        f"MoEMesh.single({device_type!r})   # one process alone",
                    ],
                )
            )
        degrees = {"dp": dp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
        world = dist.get_world_size()
        check_device_of_rank(where, device_type)
        if device_type != "cpu":
            # torch sets the device of this rank, from LOCAL_RANK, when the first mesh is made, and
            # not once a tensor is on a device. This mesh makes no groups.
            init_device_mesh(device_type, (world,))
        # Before other checks, so that all ranks report invalid degrees of one rank.
        settings = degrees | settings_of_device(device_type)
        check_ranks_agree(where, settings, [dist.group.WORLD], device_type)
        check_capability(where, device_type)
        check_degrees(where, degrees)
        check_dense(where, degrees, world)
        edp = expert_data_degree(where, ep, etp, world)
        dense = init_device_mesh(device_type, (dp, cp, tp), mesh_dim_names=role_names(DENSE))
        expert = init_device_mesh(device_type, (edp, ep, etp), mesh_dim_names=role_names(EXPERT))
        return _of_device_meshes((dense, own_names(DENSE)), (expert, own_names(EXPERT)))

    @staticmethod
    @refuses_other_axes("MoEMesh.from_device_mesh")
    def from_device_mesh(
        dense: DeviceMesh,
        *,
        dp: Names | None = None,
        cp: Names | None = None,
        tp: Names | None = None,
        expert: DeviceMesh | None = None,
        edp: Names | None = None,
        ep: Names | int | None = None,
        etp: Names | int | None = None,
    ) -> MoEMesh:
        """Bind our roles to the axes of a mesh that the program already has, under its own names.

        Each role takes the name of an axis, or a tuple of adjacent ones (HSDP: `dp=("replica",
        "shard")`); a role that is left out has size 1. The expert presentation is either given
        too, as a second mesh of the same ranks with names for `edp`, `ep` and `etp`, or derived
        from the sizes `ep` and `etp`.
        """
        where = "MoEMesh.from_device_mesh"
        bound = bind_roles(where, "dense", dense, {DENSE[0]: dp, DENSE[1]: cp, DENSE[2]: tp})
        given = dict(zip(EXPERT, (edp, ep, etp), strict=True))
        if expert is None:
            expert = derive_expert(where, dense, bound, given)
            return _of_device_meshes((dense, bound), (expert, own_names(EXPERT)))
        expert_bound = bind_roles(where, "expert", expert, given)
        check_same_ranks(where, dense, expert)
        return _of_device_meshes((dense, bound), (expert, expert_bound))

    @staticmethod
    def single(device_type: str = "cpu") -> MoEMesh:
        """One process alone: every axis has size 1. Needs no process group."""
        check_device_type("MoEMesh.single", device_type)
        return MoEMesh((_axis_of_one(role) for role in (*DENSE, *EXPERT)), ())

    def __getitem__(self, role: Role) -> Axis:
        try:
            return self._axes[role]
        except (KeyError, TypeError):  # a TypeError for what has no hash
            raise _no_such_role(self._axes, role) from None

    @property
    def dense(self) -> DeviceMesh:
        return self._presentation(0)[0]

    @property
    def expert(self) -> DeviceMesh:
        return self._presentation(1)[0]

    def ranks(self, presentation: Literal["dense", "expert"]) -> Tensor:
        """All ranks, laid out as (dp, cp, tp) or (edp, ep, etp)."""
        return self._presentation(presentation == "expert")[1]

    def check_ranks_agree(self, where: str, settings: Mapping[str, object]) -> None:
        """Raise on every rank if `settings` differ between ranks. One small exchange."""
        groups = [self[role].group for role in reversed(DENSE) if self[role].size > 1]
        if groups:
            check_ranks_agree(where, settings, groups, self.dense.device_type)

    def same_layout(self, other: MoEMesh) -> bool:
        """This rank has the same place in both."""
        if other is self:
            return True
        pairs = ((self[role], other[role]) for role in self._axes)
        return all((a.size, a.rank) == (b.size, b.rank) for a, b in pairs)

    def __deepcopy__(self, memo: object) -> MoEMesh:
        return self

    def __copy__(self) -> MoEMesh:
        return self

    def __reduce__(self) -> NoReturn:
        raise _not_pickled(self)

    def _presentation(self, which: int) -> tuple[DeviceMesh, Tensor]:
        if not self._presentations:
            raise MeshError(
                explain(
                    "MoEMesh.single",
                    "it has no DeviceMesh, and one is asked for",
                    why="torch makes a DeviceMesh only under a process group",
                    fixes=["MoEMesh.init('cpu')   # under torchrun --nproc-per-node 1"],
                )
            )
        return self._presentations[which]

    def __repr__(self) -> str:
        sizes = [f"{axis.name} {axis.size}" for axis in self._axes.values()]
        return f"MoEMesh({' x '.join(sizes[:3])} = {' x '.join(sizes[3:])})"


def check_mesh(where: str, mesh: MoEMesh) -> None:
    fix = "mesh = MoEMesh.single()   # one process alone; under torchrun MoEMesh.init('cpu', dp=2)"
    check_instance(where, "mesh", mesh, MoEMesh, fix)


def _no_such_role(axes: Mapping[Role, Axis], asked: object) -> MeshError:
    """For the name of an axis in place of its role, or a role that no mesh has."""
    meant = [role for role, axis in axes.items() if asked in (role.name, axis.name)]
    return MeshError(
        explain(
            "MoEMesh",
            f"mesh[{asked!r}] is not an axis; a mesh has those of {', '.join(map(repr, axes))}",
            why="an axis is found by its role, since its name is the user's",
            fixes=[f"mesh[{role!r}]   # from spmd_moe import {role!r}" for role in meant or axes],
        )
    )


def _not_pickled(held: object) -> MeshError:
    return MeshError(
        explain(
            "pickle",
            f"{held} is pickled, alone or in a layer",
            why="a process group means nothing to another process, or after a restart",
            fixes=["torch.save(layer.state_dict(), path)   # the weights, without the mesh"],
        )
    )


# --- axes and their groups --------------------------------------------------------------------


class _Alone(ProcessGroup):
    """The group of one process that knows of no other; nothing is ever sent in it."""

    def __init__(self) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]  # rank and size; torch types another overload

    @property
    def group_name(self) -> Any:
        """torch.compile asks every group for it; what torch returns is more than a str."""
        return "alone"

    def __mesh_axis__(self) -> MeshAxis:
        """How spmd_types recognises a group that torch did not make."""
        return MeshAxis.of(1, 1)


def _axis_of_one(role: Role) -> Axis:
    return Axis(role, role.name, 1, 0, _Alone())


def _of_device_meshes(*presentations: tuple[DeviceMesh, dict[Role, Names]]) -> MoEMesh:
    axes = (
        _axis(role, mesh, bound[role]) if role in bound else _axis_of_one(role)
        for (mesh, bound), roles in zip(presentations, (DENSE, EXPERT), strict=True)
        for role in roles
    )
    laid_out = (
        (
            mesh,
            in_role_order(mesh, bound, roles).reshape(
                [size_of_role(mesh, bound, r) for r in roles]
            ),
        )
        for (mesh, bound), roles in zip(presentations, (DENSE, EXPERT), strict=True)
    )
    return MoEMesh(axes, tuple(laid_out))


def _axis(role: Role, mesh: DeviceMesh, names: Names) -> Axis:
    if isinstance(names, tuple):
        # DeviceMesh has no public way to make one axis of several that keeps their groups known.
        mesh = mesh[names]._flatten()
        names = "_".join(names)
        return Axis(role, names, mesh.size(), mesh.get_local_rank(), mesh.get_group())
    dim = (mesh.mesh_dim_names or ()).index(names)
    return Axis(role, names, mesh.size(dim), mesh.get_local_rank(names), mesh.get_group(names))
