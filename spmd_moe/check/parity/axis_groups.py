"""Mesh axes as groups of ranks, and the sizes of a plain mesh.

An axis is a partition of the ranks: `tp` of a mesh dp 2 x tp 2 is ((0, 1), (2, 3)). Axes of several
meshes of the same ranks stand side by side, whether or not one of them can be made of the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from torch.distributed.device_mesh import DeviceMesh

from spmd_moe.check.layouts import Layout
from spmd_moe.core.placement import DENSE, EXPERT

Groups: TypeAlias = tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True, slots=True)
class MeshSizes:
    """The axes of a plain DeviceMesh and their sizes, outermost first; prints as `dp 2 tp 2`."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def world(self) -> int:
        return math.prod(size for _, size in self.sizes)

    def alone(self) -> MeshSizes:
        """The same axes, each with one rank."""
        return MeshSizes(tuple((name, 1) for name, _ in self.sizes))

    def single_axes(self) -> list[MeshSizes]:
        """The same axes, one of them as wide as here and the others with one rank."""
        wide = [name for name, size in self.sizes if size > 1]
        return [
            MeshSizes(tuple((n, size if n == name else 1) for n, size in self.sizes))
            for name in wide
        ]

    def __str__(self) -> str:
        return " ".join(f"{name} {size}" for name, size in self.sizes if size > 1) or "1 rank"


@final
@dataclass(frozen=True, slots=True)
class Axes:
    """All axes of a layout, by name."""

    world: int
    groups: Mapping[str, Groups]

    def __contains__(self, name: object) -> bool:
        return name in self.groups

    def size(self, name: str) -> int:
        return len(self.groups[name][0])

    def group(self, name: str, rank: int) -> tuple[int, ...]:
        return next((g for g in self.groups[name] if rank in g), (rank,))

    def coordinate(self, name: str, rank: int) -> int:
        return self.group(name, rank).index(rank)

    def joined(self, names: Iterable[str], rank: int) -> tuple[int, ...]:
        """The ranks that can be reached from `rank` along the named axes, in order."""
        names = list(names)
        reached, waiting = {rank}, [rank]
        while waiting:
            here = waiting.pop()
            for name in names:
                new = set(self.group(name, here)) - reached
                reached |= new
                waiting += new
        return tuple(sorted(reached))

    def wide(self) -> list[str]:
        """The axes of more than one rank; of axes with the same groups, the first."""
        found: dict[Groups, str] = {}
        for name, groups in self.groups.items():
            if self.size(name) > 1:
                found.setdefault(groups, name)
        return list(found.values())

    def subsets(self) -> Iterator[tuple[str, ...]]:
        """Sets of wide axes, small ones first, each set of joined groups once."""
        wide, seen = self.wide(), set[object]()
        for number in range(1, min(3, len(wide)) + 1):
            for names in itertools.combinations(wide, number):
                key = tuple(self.joined(names, rank) for rank in range(self.world))
                if key not in seen:
                    seen.add(key)
                    yield names

    def with_meshes(self, meshes: Iterable[DeviceMesh]) -> Axes:
        """Also the axes of these meshes; a name that is taken by other groups gets a mark."""
        groups = dict(self.groups)
        for mesh in meshes:
            for dim, name in enumerate(mesh.mesh_dim_names or ()):
                own = groups_along(mesh, dim)
                if groups.get(name, own) != own:
                    name = f"{name}'"
                groups.setdefault(name, own)
        return Axes(self.world, groups)


def axes_of(layout: MeshSizes | Layout) -> Axes:
    if isinstance(layout, Layout):
        sides = [{role.name: layout.sizes[role] for role in roles} for roles in (DENSE, EXPERT)]
    else:
        sides = [dict(layout.sizes)]
    groups: dict[str, Groups] = {}
    for side in sides:
        places = list(itertools.product(*(range(size) for size in side.values())))
        for position, name in enumerate(side):
            rows: dict[tuple[int, ...], list[int]] = {}
            for rank, place in enumerate(places):
                rows.setdefault(place[:position] + place[position + 1 :], []).append(rank)
            groups[name] = tuple(map(tuple, rows.values()))
    return Axes(layout.world, groups)


def groups_along(mesh: DeviceMesh, dim: int) -> Groups:
    """The groups of one dim of a mesh, of all ranks: also of those beside a slice of a mesh.

    `mesh.mesh` of a slice has the ranks around this one only; torch keeps the others in private.
    """
    whole = mesh._layout.remap_to_tensor(mesh._rank_map)  # before the dims of the slice: the others
    rows = whole.movedim(whole.ndim - mesh.ndim + dim, -1).reshape(-1, mesh.size(dim))
    return tuple(sorted(tuple(int(rank) for rank in row) for row in rows.tolist()))


def default_sizes(names: Sequence[str], world: int) -> list[MeshSizes]:
    """The meshes of 2, 4, 8 .. ranks with these axes, the smallest first."""
    found = []
    for total in (2**k for k in range(1, world.bit_length()) if 2**k <= world):
        ways = itertools.product(*(_powers(total) for _ in names))
        fitting = (way for way in ways if math.prod(way) == total)
        ordered = sorted(fitting, key=lambda way: (sum(n > 1 for n in way), way))
        found += [MeshSizes(tuple(zip(names, way, strict=True))) for way in ordered]
    return found


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]
