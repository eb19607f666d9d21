"""The check finds nothing in the layer, in any configuration: a few of many cases.

`python -m tests.support.checked_layers` runs all of them.
"""

from __future__ import annotations

import pytest

from spmd_moe.check import Layout
from spmd_moe.check.layouts import layouts
from tests.support.checked_layers import drawn, missing_pairs, run

FEW = [Layout(), Layout(tp=2, ep=2), Layout(dp=2, tp=2, etp=2), Layout(cp=2, tp=2, ep=4)]


@pytest.mark.parametrize("layout", FEW, ids=str)
def test_no_false_alarm(layout: Layout) -> None:
    assert run([layout], 2, (1, 5)) == []


def test_all_values_meet_on_all_layouts() -> None:
    """Two cases for each layout; those that exclude each other are left out."""
    cases = [case for layout in layouts(8) for case in drawn(layout, 2)]
    assert missing_pairs(cases) == set()
    assert missing_pairs(cases[:20]) != set()
