"""Faults of one of four ranks under torchrun: the job ends, says why, and leaves no process."""

from __future__ import annotations

import pytest

from tests.support.train_faults import RANK, WHERE, run_with

pytestmark = [pytest.mark.gloo, pytest.mark.long]
WAITING = [rank for rank in range(4) if rank != RANK]


@pytest.mark.parametrize("where", WHERE)
def test_a_rank_that_is_stopped(where: str) -> None:
    end = run_with("stop", where)
    assert end.status != 0 and not end.left
    told = {int(text.split()[2]): text for _, text in end.told if text.startswith("watch_hangs")}
    assert sorted(told) == WAITING, end.output
    assert all(f"; rank {RANK} has stopped." in text for text in told.values())
    assert max(at for at, _ in end.told) < 30
    assert end.seconds < 90, "torchrun gives a stopped rank 30 seconds"


@pytest.mark.parametrize("where", WHERE)
def test_a_rank_that_is_killed(where: str) -> None:
    end = run_with("kill", where)
    assert end.status != 0 and not end.left and end.seconds < 60
    assert f"(exitcode: -9) local_rank: {RANK}" in end.output


def test_a_disk_that_is_full() -> None:
    end = run_with("full", "save")
    assert end.status != 0 and not end.left and end.seconds < 60
    assert f"on rank {RANK}: File too large" in end.output
