"""Record of a traced run: each operation by the line that it comes from, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias, final

from spmd_moe.check.findings import Finding, short_path
from spmd_moe.check.tensor_origin import Lineage

Types: TypeAlias = tuple[tuple[str, str], ...]  # axis and kind, by axis
Shape: TypeAlias = tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Point:
    """A place in the program: lines of checked code, the innermost last, and an operation."""

    lines: tuple[tuple[str, int], ...]
    op: str

    @property
    def at(self) -> str:
        file, line = self.lines[-1]
        return f"{short_path(file)}:{line}"


@final
@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor as an operation gets it."""

    types: Types
    shape: Shape
    offset: int  # in its storage
    total: float  # of its elements: enough to tell that two are not the same
    made_of: Lineage = field(default_factory=Lineage)


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """One operation: its operands and results, and what it was given beside tensors."""

    operands: tuple[Operand, ...]
    plain: tuple[object, ...]
    results: tuple[Types, ...]
    shapes: tuple[Shape, ...]  # of the results
    reads: int  # of data, before it: sizes may come from there
    even: tuple[str, int] | None = None  # an axis, all of whose ranks it takes to have these rows


@final
@dataclass(slots=True)
class Record:
    """The operations, reads and findings of a run."""

    points: dict[Point, list[Seen]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    asks: bool = False  # whether shapes of shards left a view open, which those of the whole tell
    lines: dict[str, set[int]] = field(default_factory=dict)  # of checked code, by file
    tensors: int = 0
    untyped: int = 0
    # What the program read from data, how many collectives came before it, and the types of what
    # no collective had a part in.
    reads: list[tuple[int, str, Types]] = field(default_factory=list)

    def shapes_at(
        self, point: Point, number: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Of the first operand and the first result of an operation, in its pass of that number."""
        passes = self.points.get(point, [])
        seen = passes[number] if number < len(passes) else None
        if seen is None or not seen.operands or not seen.shapes:
            return None
        return seen.operands[0].shape, seen.shapes[0]
