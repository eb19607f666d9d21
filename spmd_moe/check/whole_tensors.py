"""Whole tensors: made from the parts of all ranks by their kinds, and cut into parts.

R, I   every rank has the whole           V, S(i)   the ranks' parts, joined in their order
P      the sum over the ranks             V is joined on dim 0, which holds the rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from spmd_types import Shard
from torch import Tensor

from spmd_moe.check.layouts import Layout
from spmd_moe.core.placement import DENSE, EXPERT, I, Kind, P, Placement, R, Role, V

Kinds: TypeAlias = Mapping[Role, Kind]  # one for each axis that counts


class NotAlikeError(ValueError):
    """Ranks hold different values of what is the same on all of them by its type."""

    def __init__(self, role: Role, off: float) -> None:
        super().__init__(f"it differs between the ranks of {role}, by up to {off:.3g}")
        self.role = role


class PartsError(ValueError):
    """What the ranks have does not make up the whole."""


def kinds_of(placement: Placement) -> dict[Role, Kind]:
    """One for each axis of the presentation; an axis that is not mentioned is taken for R."""
    given = {k.role: k.kind for k in placement}
    roles = DENSE if any(role in DENSE for role in given) else EXPERT
    return {role: given.get(role, R) for role in roles}


def gradient(kinds: Kinds) -> dict[Role, Kind]:
    """The kinds of the gradient."""
    return {role: kind.backward_type() for role, kind in kinds.items()}


def dim_of(kind: Kind) -> int | None:
    """The dim along which ranks hold different parts."""
    if isinstance(kind, Shard):
        return kind.dim
    return 0 if kind is V else None


def joined(by_rank: Sequence[Tensor], kinds: Kinds, layout: Layout) -> Tensor:
    """The whole; raises where ranks differ that must not."""
    roles = list(kinds)
    table = {tuple(layout.place(rank)[role] for role in roles): t for rank, t in enumerate(by_rank)}
    for position in reversed(range(len(roles))):
        rows: dict[tuple[int, ...], list[Tensor]] = {}
        for key in sorted(table):
            rows.setdefault(key[:position] + key[position + 1 :], []).append(table[key])
        role = roles[position]
        table = {key: _join(parts, kinds[role], role) for key, parts in rows.items()}
    return table[()]


def _join(parts: list[Tensor], kind: Kind, role: Role) -> Tensor:
    if kind is P:
        return torch.stack(parts).sum(0)
    if kind is R or kind is I:
        for other in parts[1:]:
            off = distance(parts[0], other)
            if off > SAME:
                raise NotAlikeError(role, off)
        return parts[0]
    return torch.cat(parts, dim_of(kind) or 0) if parts[0].ndim else torch.stack(parts)


SAME = 1e-12  # of what ranks compute alike; sums may be taken in another order on them


# Values in a check are about the size of 1. A value that is zero except for rounding, such as the
# gradient of a score divided by the same score, is not compared with another such zero.
SMALL = 0.1


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, beside the largest value; infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    off = float((a - b).abs().max() / b.abs().max().clamp(min=SMALL))
    return float("inf") if off != off else off


def parts(
    whole: Tensor, shapes: Sequence[torch.Size], kinds: Kinds, layout: Layout
) -> list[Tensor]:
    """Each rank's part, in the sizes that the ranks have; of a P, one rank has it all."""
    return [_part(whole, shapes, kinds, layout, rank) for rank in range(layout.world)]


def _part(
    whole: Tensor, shapes: Sequence[torch.Size], kinds: Kinds, layout: Layout, rank: int
) -> Tensor:
    place = layout.place(rank)
    for dim in sorted({d for d in map(dim_of, kinds.values()) if d is not None}):
        cut = [role for role, kind in kinds.items() if dim_of(kind) == dim]
        rest = [role for role in kinds if role not in cut]
        sizes = _sizes(shapes, dim, cut, rest, place, layout)
        key = tuple(place[role] for role in cut)
        before = sum(size for other, size in sizes.items() if other < key)
        if sum(sizes.values()) != whole.shape[dim]:
            have = f"{list(sizes.values())} rows on the ranks of {', '.join(map(str, cut))}"
            raise PartsError(f"{have}, of {whole.shape[dim]} on dim {dim} of the whole")
        whole = whole.narrow(dim, before, sizes[key])
    if any(kind is P and place[role] for role, kind in kinds.items()):
        whole = torch.zeros_like(whole)
    return whole.clone()


def _sizes(
    shapes: Sequence[torch.Size],
    dim: int,
    cut: list[Role],
    rest: list[Role],
    place: Mapping[Role, int],
    layout: Layout,
) -> dict[tuple[int, ...], int]:
    """Of each place on the axes that cut the dim: its size, on the ranks beside this one."""
    found = {}
    for rank, shape in enumerate(shapes):
        other = layout.place(rank)
        if all(other[role] == place[role] for role in rest):
            found[tuple(other[role] for role in cut)] = shape[dim]
    return dict(sorted(found.items()))
