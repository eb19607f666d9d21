"""The plan of a layout: as an object, as tables, and from the command line."""

from __future__ import annotations

import dataclasses

import pytest

from spmd_moe import ConfigError
from spmd_moe.check import Layout, make_plan
from spmd_moe.check.command_line import main
from spmd_moe.core.placement import CP, DP, EDP, EP, ETP, TP, R
from tests.support.layer_targets import SMALL, layer, small

LAYOUT = Layout(dp=2, tp=4, ep=4, etp=2)


def test_a_plan_can_be_asked() -> None:
    plan = make_plan(small, LAYOUT, tokens=5)
    (rows,) = plan.rows
    assert rows.shape.sizes == (2, 2, 1, 0) and rows.shape.padded == 2
    owed = {row.name: row for row in plan.obligations}
    assert owed["router.weight_ED"].reduce_axes == (DP, CP)
    assert owed["experts.w1_eFD"].reduce_axes == (EDP,)
    assert owed["experts.w1_eFD"].norm_axes == (EP, ETP)
    assert {row.divisor for row in plan.obligations} == {1}
    assert {c.role for c in plan.collectives} == {EP, ETP, TP}
    assert sum(c.bytes for c in plan.collectives if c.when == "forward") > 0


def test_losses_are_whole_on_tp_where_the_model_is() -> None:
    here = make_plan(small, LAYOUT, tokens=8)
    assert [(s.term, s.sums, s.whole) for s in here.scales] == [
        ("balance_loss", (DP, CP, TP), ()),
        ("z_loss", (DP, CP, TP), ()),
    ]
    whole = make_plan(layer(dataclasses.replace(SMALL, src=R, dst=R)), LAYOUT, tokens=8)
    assert {(s.sums, s.whole) for s in whole.scales} == {((DP, CP), (TP,))}


def test_a_layout_that_cannot_be_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"num_experts=24 cannot be split over axis 'ep' \(5 ranks\)"
    ):
        make_plan(small, Layout(tp=5, ep=5), tokens=8)


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "tests.support.layer_targets:small", "--tokens", "5", "--layout"]
    assert main([*words, "dp 2 tp 4 ep 4 etp 2"]) == 0
    said = capsys.readouterr().out
    assert "[2, 2, 1, 0]" in said and "router.weight_ED" in said and "balance_loss" in said
    assert said.count("all_to_all") == 5
    assert main([*words, "tp 5 ep 5"]) == 1
    assert "fix: num_experts=25" in capsys.readouterr().out
    assert main([*words, "tp 2", "--rank", "2"]) == 2
    assert main(["plan", "tests.support.layer_targets:nothing"]) == 2
    assert "tests.support.layer_targets:layer" in capsys.readouterr().err
