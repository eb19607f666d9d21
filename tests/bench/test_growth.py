"""The table of what a rank sends: it is the one in the docs, and one row is computed by hand."""

from __future__ import annotations

from tests.bench.growth import DIM, E, K, costs, table
from tests.support.docs_blocks import DOCS

T = 4096


def test_the_docs_have_these_rows() -> None:
    page = (DOCS / "benchmarks.md").read_text()
    for row in table({world: costs(world, T) for world in (2, 4, 8)}):
        assert row in page, "python -m tests.bench.growth --write"


def test_two_ranks_by_hand() -> None:
    rows, float32, int64 = T * K // 2, 4, 8  # half of all choices are of the other rank
    there_and_back_with_gradients = 4 * rows * DIM * 2
    weights_and_gradients = 2 * rows * float32
    counts_and_fault_mark = (E // 2 + 1) * int64
    by_hand = there_and_back_with_gradients + weights_and_gradients + counts_and_fault_mark
    assert costs(2, T)["AllToAll"].bytes == by_hand
