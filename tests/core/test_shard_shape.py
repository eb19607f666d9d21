"""How rows are shared out: arithmetic against its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_moe import ShapeError, ShardShape

totals, ranks = st.integers(0, 200), st.integers(1, 17)
ragged = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@given(totals, ranks)
def test_even_is_the_ceil_chunk_rule(total: int, n: int) -> None:
    chunk = math.ceil(total / n)
    shape = ShardShape.even(total, n)
    assert shape.sizes == tuple(max(0, min(chunk, total - r * chunk)) for r in range(n))
    assert (shape.total, shape.ranks, shape.padded) == (total, n, chunk)
    assert shape.packed


@given(ragged)
def test_ragged_keeps_what_it_is_given(sizes: list[int]) -> None:
    shape = ShardShape.ragged(sizes)
    assert list(shape.sizes) == sizes
    assert list(shape.offsets) == [sum(sizes[:r]) for r in range(len(sizes))]
    assert (shape.total, shape.padded) == (sum(sizes), max(sizes))
    assert shape.padded_total == max(sizes) * len(sizes)
    assert shape.equal == (len(set(sizes)) == 1)


@given(ragged)
def test_packed_means_that_padding_is_behind_everything(sizes: list[int]) -> None:
    """Padded and joined, the rows are a prefix."""
    shape = ShardShape.ragged(sizes)
    rows = [row for size in sizes for row in [True] * size + [False] * (shape.padded - size)]
    assert shape.packed == (rows == sorted(rows, reverse=True))


def test_five_rows_over_four_ranks() -> None:
    shape = ShardShape.even(5, 4)
    assert (shape.sizes, shape.offsets) == ((2, 2, 1, 0), (0, 2, 4, 5))
    assert str(shape) == "5 rows as [2, 2, 1, 0]"


def test_equal_shapes_are_one_key() -> None:
    assert len({ShardShape.even(6, 3), ShardShape.ragged([2, 2, 2]), ShardShape((2, 2, 2))}) == 1


def test_more_ranks_than_rows_and_no_rows() -> None:
    assert ShardShape.even(1, 4).sizes == (1, 0, 0, 0)
    assert ShardShape.even(0, 3).sizes == (0, 0, 0)
    assert ShardShape.even(0, 3).padded_total == 0


@pytest.mark.parametrize(
    ("sizes", "text"), [([], "there are 0 ranks"), ([2, -1], "negative entry")]
)
def test_impossible_sizes(sizes: list[int], text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        ShardShape.ragged(sizes)


@pytest.mark.parametrize(("total", "n", "text"), [(-1, 2, "total is -1"), (3, 0, "0 ranks")])
def test_impossible_totals(total: int, n: int, text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        ShardShape.even(total, n)
