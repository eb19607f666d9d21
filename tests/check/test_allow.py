"""Comments that allow an escape, in the traced check: the deliberate forms, and accidental ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spmd_moe.check import Layout, run_checks
from tests.support import faulty_targets as t

Step = Callable[[t.Module, Tensor], Tensor]


def on_the_line(m: t.Module, x: Tensor) -> Tensor:
    return x + x.detach()  # spmd: allow detach - a test


def at_the_end_of_the_statement(m: t.Module, x: Tensor) -> Tensor:
    return torch.add(
        x.detach(),
        x,
    )  # spmd: allow detach - a test


# spmd: allow detach - a test
@torch.enable_grad()
def above_the_decorator(m: t.Module, x: Tensor) -> Tensor:
    y = x.detach()
    return x + y


# spmd: allow detach - a test
def above_the_function(m: t.Module, x: Tensor) -> Tensor:
    y = x.detach()
    return x + y


def commented_out(m: t.Module, x: Tensor) -> Tensor:
    # y = x.detach()  # spmd: allow detach - an old line
    return x + x.detach()


def in_a_string(m: t.Module, x: Tensor) -> Tensor:
    _ = "# spmd: allow detach - a string"; return x + x.detach()  # fmt: skip  # noqa: E702


def in_a_docstring(m: t.Module, x: Tensor) -> Tensor:
    """Text.

    # spmd: allow detach - text"""
    return x + x.detach()


def prose(m: t.Module, x: Tensor) -> Tensor:
    return x + x.detach()  # spmd: allow this odd detach and more - words


ALLOWED: list[Step] = [on_the_line, at_the_end_of_the_statement, above_the_function]
ALLOWED += [above_the_decorator]
NOT_ALLOWED: list[Step] = [commented_out, in_a_string, in_a_docstring, prose]


@pytest.mark.parametrize("run", [*ALLOWED, *NOT_ALLOWED], ids=lambda run: run.__name__)
def test_what_a_comment_allows(run: Step) -> None:
    report = run_checks(t.of(run), chosen=[Layout(dp=2, tp=2)], tokens=(4,))
    found = [mistake.finding.rule for mistake in report.mistakes()]
    assert found == ([] if run in ALLOWED else ["X3"]), str(report)
