"""The plan of a layout: as an object, as tables, and from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spmd_moe import (
    AllToAll,
    ConfigError,
    DedupAllToAll,
    Dispatcher,
    FixedCapacity,
    MoE,
    MoEMesh,
    __version__,
)
from spmd_moe.check import CannotCheckError, Case, Layout, make_plan
from spmd_moe.check.command_line import main
from spmd_moe.check.target import Target
from spmd_moe.core.placement import CP, DP, EDP, EP, ETP, TP, Placement, R, V
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


def with_dispatcher(make: Callable[[MoEMesh], Dispatcher[Any]]) -> Target:
    def target(mesh: MoEMesh, tokens: int) -> Case:
        config = dataclasses.replace(SMALL, src=R, dst=R)
        module = MoE(config, mesh, make(mesh))
        return Case(module, (torch.randn(tokens, 16),), (Placement((DP[V], CP[V], TP[R])),))

    return target


def test_a_plan_of_fixed_shapes() -> None:
    """As many rows for every pair of ranks, for all tokens."""
    plan = make_plan(with_dispatcher(lambda mesh: FixedCapacity(mesh, 24, 5)), LAYOUT, tokens=2)
    shapes = {c.what: c.shape for c in plan.collectives if c.role is EP}
    assert shapes["rows to their experts"] == (4 * 5, 16)
    assert shapes["choices of each expert, and weights"] == (4, 6 + 5)
    assert "not forecast" not in str(plan)


def test_a_plan_shows_what_both_exchanges_send() -> None:
    """24 tokens on 4 ranks of tp are 6 on each; top_k is 2, and a rank of ep has 6 experts."""
    plan = make_plan(with_dispatcher(lambda mesh: DedupAllToAll(mesh, 24)), LAYOUT, tokens=24)
    (sent,) = plan.sent
    both_elsewhere = (18 * 17) / (24 * 23)
    assert (sent.dispatcher, sent.all_to_all) == ("DedupAllToAll", 12)
    assert sent.dedup == pytest.approx(6 * 4 * (1 - both_elsewhere))
    lines = [line.split() for line in str(plan).splitlines()]
    assert ["layer", "DedupAllToAll", "12", "11", "0.89"] in lines
    (empty,) = make_plan(with_dispatcher(lambda mesh: AllToAll(mesh, 24)), LAYOUT, tokens=0).sent
    assert (empty.all_to_all, empty.dedup, empty.share) == (0, 0, 1)


class Own:
    """A dispatcher that does not say what it will send."""

    num_experts, fixed_shapes, axes = 24, False, ()

    def __init__(self, mesh: MoEMesh) -> None:
        self.one = AllToAll(mesh, 24)
        self.dispatch, self.collect = self.one.dispatch, self.one.collect
        self.combine = self.one.combine

    def forecast(self, batch: object) -> None:
        pass


def test_a_dispatcher_that_forecasts_nothing_is_left_out_in_one_line() -> None:
    plan = make_plan(with_dispatcher(Own), LAYOUT, tokens=8)
    assert plan.not_forecast == (("layer", "Own"),) and plan.collectives == ()
    assert {row.divisor for row in plan.obligations} == {1} and plan.scales and plan.rows
    (line,) = (line for line in str(plan).splitlines() if "Own does" in line)
    assert line == "without those of layer: Own does not forecast its collectives"


def test_a_target_of_a_device_mesh_is_told_what_a_moe_mesh_has() -> None:
    def target(mesh: Any, tokens: int) -> Case:
        return mesh.get_group("tp")  # type: ignore[no-any-return]

    with pytest.raises(CannotCheckError, match=r"for spmd-moe parity\.\n  fix: mesh\[TP\]\.group"):
        make_plan(target, LAYOUT, tokens=5)


def test_the_command_line_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"spmd_moe {__version__}\n"


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "tests.support.layer_targets:small", "--tokens", "5", "--layout"]
    assert main([*words, "dp 2 tp 4 ep 4 etp 2"]) == 0
    said = capsys.readouterr().out
    assert "[2, 2, 1, 0]" in said and "router.weight_ED" in said and "balance_loss" in said
    assert said.count("all_to_all") == 7
    assert main([*words, "tp 5 ep 5"]) == 1
    assert "fix: num_experts=25" in capsys.readouterr().out
    assert main([*words, "tp 2", "--rank", "2"]) == 2
    assert main(["plan", "tests.support.layer_targets:nothing"]) == 2
    assert "tests.support.layer_targets:layer" in capsys.readouterr().err
