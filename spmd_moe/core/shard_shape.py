"""How the rows of a sharded dim are shared out over the ranks of one axis. Pure arithmetic.

Five rows over four ranks by the even rule (chunks of ceil(5/4) = 2):

    rank   0    1    2    3
    rows   a b  c d  e .  . .        sizes (2, 2, 1, 0), padded 2, padded total 8

A dot is padding: it exists only while a collective runs, which needs equal sizes on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import final

from spmd_moe.core.errors import ShapeError, explain


@final
@dataclass(frozen=True, slots=True)
class ShardShape:
    """The size of a sharded dim on every rank of an axis.

    Build it with `even` (the ceil-chunk rule) or `ragged` (sizes that are known).

    Args:
        sizes: Rows of each rank, in the order of the ranks.

    Raises:
        ShapeError: A size is negative, or there are no ranks.

    Example:
        >>> from spmd_moe import ShardShape
        >>> shape = ShardShape.even(5, ranks=4)
        >>> print(shape, shape.padded, shape.offsets)
        5 rows as [2, 2, 1, 0] 2 (0, 2, 4, 5)
        >>> print(ShardShape.ragged([0, 7, 1]))
        8 rows as [0, 7, 1]
    """

    sizes: tuple[int, ...]
    # Derived once, since every redistribute reads them.
    total: int = field(init=False, compare=False)
    padded: int = field(init=False, compare=False)
    offsets: tuple[int, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.sizes:
            raise _no_ranks("ShardShape")
        if min(self.sizes) < 0:
            raise ShapeError(
                explain(
                    "ShardShape",
                    f"sizes {list(self.sizes)} has a negative entry; all must be 0 or more",
                    why="a rank cannot hold fewer than no rows",
                    fixes=["ShardShape.ragged(counts.tolist())   # rows on every rank"],
                )
            )
        ends = tuple(accumulate(self.sizes))
        object.__setattr__(self, "total", ends[-1])
        object.__setattr__(self, "padded", max(self.sizes))
        object.__setattr__(self, "offsets", (0, *ends[:-1]))

    @staticmethod
    def even(total: int, ranks: int) -> ShardShape:
        """Chunks of ceil(total / ranks): full chunks first, then a shorter one, then empty ones."""
        if ranks < 1:
            raise _no_ranks("ShardShape.even")
        if total < 0:
            raise ShapeError(
                explain(
                    "ShardShape.even",
                    f"total is {total}; it must be 0 or more",
                    why="a dim cannot be shorter than nothing",
                    fixes=["ShardShape.even(x.shape[dim], axis.size)"],
                )
            )
        chunk = -(-total // ranks)
        return ShardShape(tuple(max(0, min(chunk, total - r * chunk)) for r in range(ranks)))

    @staticmethod
    def ragged(sizes: Sequence[int]) -> ShardShape:
        """Sizes that are known, such as counts that were exchanged."""
        return ShardShape(tuple(sizes))

    @property
    def ranks(self) -> int:
        return len(self.sizes)

    @property
    def padded_total(self) -> int:
        """Rows that a collective moves when every rank is padded to the longest shard."""
        return self.padded * self.ranks

    @property
    def equal(self) -> bool:
        """True if all ranks hold the same number of rows, so that nothing is padded."""
        return self.padded_total == self.total

    @property
    def packed(self) -> bool:
        """True if all padding is behind the last row, so that trimming a gathered tensor is a view.

        Every `even` shape is packed.
        """
        return all(
            start == min(r * self.padded, self.total) for r, start in enumerate(self.offsets)
        )

    def __str__(self) -> str:
        return f"{self.total} rows as {list(self.sizes)}"


def _no_ranks(where: str) -> ShapeError:
    return ShapeError(
        explain(
            where,
            "there are 0 ranks; at least 1 is needed",
            why="rows have to lie on some rank",
            fixes=["ShardShape.even(total, ranks=1)   # everything on one rank"],
        )
    )
