"""Placements in words: how a tensor lies over the axes of a mesh.

"dp 0, tp 1"    sharded over dp on dim 0 and over tp on dim 1; the first axis is the outermost
"tp 0 in 2"     two blocks packed on dim 0 (gate | up), each of them sharded over tp
"tp P"          each rank of tp holds a part of a sum
"tp R"          the whole on every rank of tp, each of which uses it for work of its own: its
                gradient is a sum over tp that is taken elsewhere
"tp I"          the whole on every rank of tp, all of which do the same with it; the default
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from spmd_types import Shard

from spmd_moe.check.parity.axis_groups import Axes
from spmd_moe.check.target import cannot
from spmd_moe.core.placement import P, Placement, R, V


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """One axis along which a dim is sharded; `blocks` are packed on the dim and cut one by one."""

    axis: str
    dim: int
    blocks: int = 1


@final
@dataclass(frozen=True, slots=True)
class Lies:
    """How a tensor lies over the ranks."""

    cuts: tuple[Cut, ...] = ()
    sums: tuple[str, ...] = ()  # P: what ranks hold are parts of a sum over these axes
    own: tuple[str, ...] = ()  # R: used for other work on each rank, so gradients are such parts

    def __str__(self) -> str:
        packed = [(c, f" in {c.blocks}" if c.blocks > 1 else "") for c in self.cuts]
        said = [f"{c.axis} {c.dim}{blocks}" for c, blocks in packed]
        said += [f"{axis} P" for axis in self.sums] + [f"{axis} R" for axis in self.own]
        return ", ".join(said) or "whole"


_WORD = re.compile(r"(\S+) (?:(-?\d+)(?: in (\d+))?|([PRI]))")


def lies(words: str, axes: Axes, what: str) -> Lies:
    """What the words say; refused where an axis is not one of the mesh."""
    cuts, sums, own = list[Cut](), list[str](), list[str]()
    for part in (p.strip() for p in words.split(",")):
        if not part:
            continue
        match = _WORD.fullmatch(part)
        if match is None:
            why = "each part names an axis, and a dim or one of P, R, I"
            raise cannot(what, f"{part!r} is no placement in words", why, '"dp 0, tp 1"', '"tp P"')
        axis, dim, blocks, kind = match.groups()
        if axis not in axes:
            have = ", ".join(axes.groups)
            why = "a placement names axes of the mesh"
            raise cannot(what, f"the mesh has no axis {axis!r}; it has {have}", why, f"axes={axis}")
        if dim is not None:
            cuts.append(Cut(axis, int(dim), int(blocks or 1)))
        elif kind != "I":
            (sums if kind == "P" else own).append(axis)
    _check_once(words, [*(c.axis for c in cuts), *sums, *own], what)
    return Lies(tuple(cuts), tuple(sums), tuple(own))


def _check_once(words: str, named: list[str], what: str) -> None:
    for axis in named:
        if named.count(axis) > 1:
            why = "a tensor has one placement on an axis"
            raise cannot(what, f"{words!r} names axis {axis!r} twice", why, "name it once")


def lies_of(placement: Placement, names: Iterable[str]) -> Lies:
    """The same of a declared placement, on the axes that are there; V holds rows of its own."""
    cuts, sums, own = list[Cut](), list[str](), list[str]()
    there = set(names)
    for k in placement:
        axis = k.role.name
        if axis not in there:
            continue
        if isinstance(k.kind, Shard):
            cuts.append(Cut(axis, k.kind.dim))
        elif k.kind is V:
            cuts.append(Cut(axis, 0))
        elif k.kind is P:
            sums.append(axis)
        elif k.kind is R:
            own.append(axis)
    return Lies(tuple(cuts), tuple(sums), tuple(own))
