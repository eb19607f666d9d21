"""Random layers against the oracle. For an hour of them run `tests.layer.fuzz_layer`."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from spmd_moe.layer import combine
from tests.layer.fuzz_layer import fuzz


def test_random_layers_equal_one_process() -> None:
    counts = fuzz(0, times=60)
    assert counts["equal"] > 30 and counts["with tokens"] > 25


def test_the_fuzzer_finds_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def folded(*args: Any) -> Tensor:
        right: Tensor = fold(*args)
        return right * (1.0 + 1e-8)

    fold = combine.fold
    monkeypatch.setattr(combine, "fold", folded)
    with pytest.raises(AssertionError, match="is off by"):
        fuzz(0, times=60)
