"""`spmd-moe check` and `plan` on swapped models, whole: attention, embeddings, rotary tables."""

from __future__ import annotations

import pytest

from spmd_moe.check import Layout, make_plan, run_checks
from spmd_moe.check.command_line import main
from spmd_moe.check.target import Target
from spmd_moe.core.placement import CP, DP, EDP, EP
from tests.hf.models import MODELS, long_if
from tests.support import hf_targets

LAYOUTS = [Layout(dp=2, tp=2, ep=4)]


# Qwen3-MoE is checked with its losses; the layers of Mixtral and OLMoE have no kind of tensor more.
WHOLE = [
    pytest.param(name, marks=long_if(name in ("qwen3_moe", "mixtral", "olmoe"))) for name in MODELS
]


@pytest.mark.parametrize("name", WHOLE)
def test_a_swapped_model_has_no_finding(name: str) -> None:
    report = run_checks(hf_targets.swapped(name), chosen=LAYOUTS, tokens=(3,))
    assert report.ok, str(report)
    tensors, untyped = (sum(getattr(r, k) for r in report.results) for k in ("tensors", "untyped"))
    assert tensors > 500 and untyped == 0  # of operations in transformers' files


def test_losses_of_all_layers_have_no_finding() -> None:
    report = run_checks(hf_targets.with_loss, chosen=LAYOUTS, tokens=(3,))
    assert report.ok, str(report)
    tensors, untyped = (sum(getattr(r, k) for r in report.results) for k in ("tensors", "untyped"))
    assert tensors > 500 and untyped == 0


BROKEN: dict[str, tuple[Target, str, str]] = {
    "never_summed": (hf_targets.never_summed, "types", "Invariant type on axis 'dp'"),
    "rows_of_their_own": (hf_targets.rows_of_their_own, "types", "Invariant type on axis 'tp'"),
    "not_reduced": (hf_targets.not_reduced, "types", "on axis 'tp'"),
    "table_undeclared": (hf_targets.table_undeclared, "X9", "'inv_freq' f32[4] has no declared"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_found(name: str) -> None:
    target, rule, words = BROKEN[name]
    report = run_checks(target, chosen=LAYOUTS, tokens=(3,))
    assert any(m.finding.rule == rule and words in str(m) for m in report.mistakes()), str(report)


def test_the_plan_of_a_swapped_model() -> None:
    plan = make_plan(hf_targets.qwen3_moe, Layout(dp=2, tp=2, ep=2), tokens=6)
    assert [rows.layer for rows in plan.rows] == [
        "model.layers.0.mlp.moe",
        "model.layers.1.mlp.moe",
    ]
    owed = {row.name: row.reduce_axes for row in plan.obligations}
    assert owed["model.layers.0.self_attn.q_proj.weight"] == (DP, CP)
    assert owed["model.layers.0.mlp.moe.experts.w1_eFD"] == (EDP,)
    assert not any(name.endswith("inv_freq") for name in owed)  # it is in no checkpoint
    assert {c.dtype.is_floating_point for c in plan.collectives if c.role is EP} >= {True}


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    target = "tests.support.hf_targets:qwen3_moe"
    assert main(["plan", target, "--layout", "dp 2 ep 2"]) == 0
    assert "model.layers.1.mlp.moe" in capsys.readouterr().out
    assert main(["check", target, "--layout", "dp 2 ep 2", "--tokens", "3"]) == 0
