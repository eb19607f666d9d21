"""Layouts: how many ranks each axis has, where a rank stands on them, and which ones there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DENSE, DP, EDP, EP, ETP, EXPERT, TP, Role


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """The degrees of a mesh; prints as `dp 2 tp 2 = ep 4`."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world(self) -> int:
        return self.dp * self.cp * self.tp

    @property
    def sizes(self) -> dict[Role, int]:
        edp = self.world // (self.ep * self.etp)
        return {DP: self.dp, CP: self.cp, TP: self.tp, EDP: edp, EP: self.ep, ETP: self.etp}

    def place(self, rank: int) -> dict[Role, int]:
        """The rank's coordinate on every axis; the last axis of each presentation runs fastest."""
        place: dict[Role, int] = {}
        for roles in (DENSE, EXPERT):
            rest = rank
            for role in reversed(roles):
                place[role] = rest % self.sizes[role]
                rest //= self.sizes[role]
        return place

    def rank(self, place: dict[Role, int], roles: tuple[Role, ...] = DENSE) -> int:
        """The rank that stands at these coordinates of a presentation, 0 where none is given."""
        found = 0
        for role in roles:
            found = found * self.sizes[role] + place.get(role, 0)
        return found

    def mesh(self, device_type: str = "cpu") -> MoEMesh:
        """The mesh, under the process group that is there."""
        return MoEMesh.init(
            device_type, dp=self.dp, cp=self.cp, tp=self.tp, ep=self.ep, etp=self.etp
        )

    def __str__(self) -> str:
        sides = (
            " ".join(f"{role} {self.sizes[role]}" for role in roles if self.sizes[role] > 1)
            for roles in (DENSE, EXPERT)
        )
        return " = ".join(side or "1" for side in sides)


def layouts(world: int) -> Iterator[Layout]:
    """Every way to fold up to `world` ranks into (dp, cp, tp) and (edp, ep, etp)."""
    for ranks in range(1, world + 1):
        for dp, cp, tp in _factors(ranks):
            for _, ep, etp in _factors(ranks):
                yield Layout(dp, cp, tp, ep, etp)


def _factors(n: int) -> Iterator[tuple[int, int, int]]:
    """All ordered ways to write n as a product of three."""
    for a in _divisors(n):
        for b in _divisors(n // a):
            yield a, b, n // a // b


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
