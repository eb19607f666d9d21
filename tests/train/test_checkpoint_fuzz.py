"""Thousands of mutations of checkpoints. For an hour of them run `tests.train.fuzz_checkpoints`."""

from __future__ import annotations

from pathlib import Path

import pytest

from spmd_moe import CheckpointError
from spmd_moe.train.checkpoint.optimizer_json import check_settings, saved_by_name
from tests.train.fuzz_checkpoints import fuzz


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_no_mutation_loads_as_what_was_not_saved(seed: int, tmp_path: Path) -> None:
    counts = fuzz(tmp_path, seed, times=1000)
    assert counts["refused"] > 700 and counts["loaded"] > 3


@pytest.mark.parametrize("dtype", ["float33", ["float32"], {"float32": 1}, None])
def test_an_optimizer_state_of_no_dtype(dtype: object) -> None:
    """Found by the fuzzer: a list has no hash."""
    state = {"weight": {"exp_avg": {"like_parameter": True, "dtype": dtype}}}
    with pytest.raises(CheckpointError, match="the state of 'weight'"):
        saved_by_name([{"settings": {}, "state": state}])


def test_a_learning_rate_that_is_missing() -> None:
    """Found by the fuzzer: the optimizer kept the one that it had."""
    now = {"lr": 0.1, "betas": (0.9, 0.99), "fused": None}
    check_settings({"lr": 0.2, "betas": [0.8, 0.9]}, now, now)
    with pytest.raises(CheckpointError, match="the setting 'lr', which is missing"):
        check_settings({"betas": [0.8, 0.9]}, now, now)
