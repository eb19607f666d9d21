"""The check finds nothing in the layer, in any configuration: a few of many cases.

`python -m tests.support.checked_layers` runs all of them.
"""

from __future__ import annotations

import pytest
import torch

from spmd_moe import (
    AllGather,
    MoE,
    MoEConfig,
    MoEMesh,
    R,
    RouterConfig,
    ScoreApplication,
    init_weights,
)
from spmd_moe.check import Case, Layout, run_checks
from spmd_moe.check.layouts import layouts
from spmd_moe.core.placement import CP, DP, TP, Placement, V
from tests.support.checked_layers import drawn, missing_pairs, run

FEW = [Layout(), Layout(tp=2, ep=2), Layout(dp=2, tp=2, etp=2), Layout(cp=2, tp=2, ep=4)]


@pytest.mark.parametrize("layout", FEW, ids=str)
def test_no_false_alarm(layout: Layout) -> None:
    assert run([layout], 2, (1, 5)) == []


def weighed_after_experts(mesh: MoEMesh, tokens: int) -> Case:
    """The weights, of a dtype of their own, multiply rows that are P on etp."""
    router = RouterConfig(4, 2, dtype=torch.float64)
    late = ScoreApplication.IN_COMBINE
    layer = MoE(
        MoEConfig(8, 16, router, src=R, dst=R, score_application=late), mesh, AllGather(mesh, 4)
    )
    init_weights(layer, mesh, seed=0)
    x = torch.randn(tokens, 8, requires_grad=True)
    return Case(layer, (x,), (Placement((DP[V], CP[V], TP[R])),))


def test_weights_multiply_rows_that_are_still_to_be_summed() -> None:
    report = run_checks(weighed_after_experts, chosen=[Layout(tp=2, etp=2)], tokens=(5,))
    assert report.ok, str(report)


def test_all_values_meet_on_all_layouts() -> None:
    """Two cases for each layout; those that exclude each other are left out."""
    cases = [case for layout in layouts(8) for case in drawn(layout, 2)]
    assert missing_pairs(cases) == set()
    assert missing_pairs(cases[:20]) != set()
