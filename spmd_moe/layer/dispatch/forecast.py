"""The collectives that one forward and one backward will issue, as records: nothing runs.

A dispatcher forecasts its own, from the numbers of tokens and choices of the ranks in its group.
"""

# Shape letters in this file:
#   i, s  ranks of ep that send and receive    j  ranks of etp    E  experts

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch

from spmd_moe.core.mesh import Axis
from spmd_moe.core.placement import Role
from spmd_moe.core.shard_shape import ShardShape

When: TypeAlias = Literal["forward", "backward"]


@final
@dataclass(frozen=True, slots=True)
class Collective:
    """One collective as this rank issues it."""

    when: When
    what: str  # what travels, and why
    op: str
    role: Role
    shape: tuple[int, ...]  # of what this rank gives, padding included
    dtype: torch.dtype
    even: bool = True  # every rank of the axis gives as much without padding

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Sizes of one call, of every rank in this rank's group of ep and etp.

    Attributes:
        tokens_ij: Tokens of the rank at i on ep and j on etp.
        counts_ijE: How many of the choices of that rank's tokens fall on each expert.
        reached_ijs: How many of that rank's tokens have a choice on each rank of ep.
        dim: Width of a token.
        top_k: Choices of each token.
        dtype: Dtype of the tokens.
        weight_dtype: Dtype of the router's weights.
        early: The experts apply the weights, which are passed to `dispatch`.
    """

    tokens_ij: Sequence[Sequence[int]]
    counts_ijE: Sequence[Sequence[Sequence[int]]]
    reached_ijs: Sequence[Sequence[Sequence[int]]]
    dim: int
    top_k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    early: bool

    @property
    def score_dtype(self) -> torch.dtype | None:
        """The dtype of the weights that the experts apply; None if they apply none."""
        return self.weight_dtype if self.early else None

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which rows are summed over ranks."""
        return torch.promote_types(self.dtype, torch.float32)

    def slots_ijs(self, num_local: int) -> list[list[list[int]]]:
        """How many choices of the rank at i, j fall on each rank of ep, of `num_local` experts."""
        return [
            [
                [sum(counts_E[e : e + num_local]) for e in range(0, len(counts_E), num_local)]
                for counts_E in of_etp
            ]
            for of_etp in self.counts_ijE
        ]


def one(
    when: When,
    what: str,
    op: str,
    axis: Axis,
    shape: Sequence[int],
    dtype: torch.dtype,
    even: bool = True,
) -> Iterator[Collective]:
    """The collective, unless the axis has one rank: then nothing moves."""
    if axis.size > 1:
        yield Collective(when, what, op, axis.role, tuple(shape), dtype, even)


def gather(
    when: When,
    what: str,
    axis: Axis,
    rows: ShardShape,
    tail: Sequence[int],
    dtype: torch.dtype,
) -> Iterator[Collective]:
    """An all-gather of this rank's rows, each of the shape `tail`."""
    yield from one(when, what, "all_gather", axis, (_padded(rows), *tail), dtype, rows.equal)


def scatter(
    when: When,
    what: str,
    axis: Axis,
    rows: ShardShape,
    tail: Sequence[int],
    dtype: torch.dtype,
) -> Iterator[Collective]:
    """A reduce-scatter of the rows of all ranks, each of the shape `tail`."""
    shape = (_padded(rows) * rows.ranks, *tail)
    yield from one(when, what, "reduce_scatter", axis, shape, dtype, rows.equal)


def _padded(rows: ShardShape) -> int:
    """Rows that a rank gives: at least one, so that none is left out."""
    return max(rows.padded, 1)
