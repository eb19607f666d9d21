"""Thousands of mutations of checkpoints. For an hour of them run `tests.train.fuzz_checkpoints`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.fuzz_checkpoints import fuzz


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_no_mutation_loads_as_what_was_not_saved(seed: int, tmp_path: Path) -> None:
    counts = fuzz(tmp_path, seed, times=1000)
    assert counts["refused"] > 700 and counts["loaded"] > 3
