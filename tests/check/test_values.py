"""The check with values: true of the layer, and not of a layer in which something is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spmd_moe.check import Layout, run_checks
from spmd_moe.check.compare_one_process import CLOSE, check_values
from spmd_moe.check.signatures import signatures
from spmd_moe.check.target import CannotCheckError
from spmd_moe.check.whole_tensors import distance
from spmd_moe.layer import router
from spmd_moe.layer.dispatch import ragged_exchange
from tests.support.faulty_targets import OnRanks, of_class
from tests.support.layer_targets import small

LAYOUTS = [Layout(dp=2, tp=2, ep=2, etp=2), Layout(cp=2, tp=2, ep=4), Layout(dp=2, cp=2, ep=2)]


def found(layout: Layout, tokens: int = 9) -> list[str]:
    """What the values say, each as its rule and its first line."""
    with signatures({"spmd_moe"}):
        findings = list(check_values(small, layout, tokens, {"spmd_moe"}, 20.0))
    return [f"{f.rule} {f.text.splitlines()[0]}" for f in findings]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_layer_is_what_its_types_say(layout: Layout, tokens: int) -> None:
    assert found(layout, tokens) == []


def test_what_is_v_in_the_parameters_has_no_whole() -> None:
    why = "V does not say how what the ranks store belongs together"
    with pytest.raises(
        CannotCheckError, match=rf"(?s)weight: .*why: {why}.*\n  at:  .*faulty_"
    ) as told:
        run_checks(of_class(OnRanks), chosen=[Layout(tp=2)], tokens=(1,), values=True)
    assert "fix: weight: ...[S[0]]" in str(told.value)


def test_zeros_that_are_rounding_are_not_compared() -> None:
    """As the gradients of a score that is divided by the same score, in float32, on two ways."""
    zero, other = torch.tensor([1.9e-7, 0.0]), torch.tensor([0.0, -6e-8])
    assert distance(zero, other) < CLOSE
    assert distance(zero + 1e-4, other) > CLOSE
    assert distance(torch.tensor([2.0]), torch.tensor([1.0])) == 1.0


def no_exchange(x: Tensor, group: Any, *, receives: list[int], sends: list[int]) -> Tensor:
    """Every rank keeps what it was to send, as far as it goes."""
    rows = sum(receives)
    return torch.cat([x, x.new_zeros(rows, *x.shape[1:])]).narrow(0, 0, rows)


def test_an_exchange_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_exchange, "exchange", no_exchange)
    assert any("output .hidden: " in line for line in found(LAYOUTS[1]))


def test_a_gate_whose_gradient_is_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(x: Tensor, axis: Any, **kinds: Any) -> Tensor:
        return x

    monkeypatch.setattr(router, "redistribute", alike)
    assert any(line.startswith("types ") for line in found(LAYOUTS[0]))
