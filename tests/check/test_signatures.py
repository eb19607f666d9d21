"""Declared placements at the calls of annotated functions, in the traced check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spmd_moe.check import Layout, run_checks
from tests.support.wrong_results import WRONG, target_of


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_tensor_is_found_in_every_container(function: Callable[[Any], Any]) -> None:
    report = run_checks(target_of(function), chosen=[Layout(tp=2)], tokens=(3,))
    (found,) = (mistake.finding for mistake in report.mistakes())
    name, path = WRONG[function]
    what = f"{name}, {path}: f32[2, 8] is V on axis 'tp' (2 ranks), but R is declared."
    assert found.text.splitlines()[0] == what
    assert "tests/support/wrong_results.py:" in found.at
