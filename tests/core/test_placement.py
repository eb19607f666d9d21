"""The vocabulary: kinds, roles, and `Placed` in signatures."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any, cast

import pytest
import spmd_types
from torch import Tensor, nn

from spmd_moe import CP, DP, EP, TP, I, P, Placed, Placement, PlacementError, R, Role, S, V
from spmd_moe.core.placement import DENSE, EXPERT, placement_of, placements_of

Tokens = Placed[Tensor, DP[V], TP[S[0]]]


def annotated(x_TD: Tokens, count: int, y: Tokens | None = None) -> Placed[Tensor, DP[R], TP[P]]:
    z = x_TD * count
    return z if y is None else z + y


class Gate(nn.Module):
    weight: Placed[Tensor, DP[R], TP[I]]
    bias: Placed[Tensor, DP[R], TP[R]] | None


def test_kinds_are_those_of_spmd_types() -> None:
    for ours, theirs in ((R, "R"), (I, "I"), (V, "V"), (P, "P"), (S, "S")):
        assert ours is getattr(spmd_types, theirs)
    assert S[0] == S(0) == spmd_types.Shard(0)
    assert {S[1]: "one"}[S(1)] == "one"


def test_signatures_aliases_and_class_bodies_can_be_read_back() -> None:
    assert placement_of(Tokens) == Placement((DP[V], TP[S[0]]))
    read = placements_of(annotated)
    assert list(read) == ["x_TD", "y", "return"]
    assert read["x_TD"] == read["y"] == placement_of(Tokens)
    assert placements_of(Gate)["weight"][TP] is I
    assert placements_of(Gate)["bias"][TP] is R
    assert placement_of(Tensor) is None and placement_of(int | None) is None


def test_prints_small() -> None:
    assert str(placement_of(Tokens)) == "dp:V tp:S(0)"
    assert (str(EP[S[2]]), repr(CP)) == ("ep:S(2)", "CP")


def test_reads_like_a_mapping() -> None:
    placement = Placement((DP[V], TP[S[0]]))
    assert placement[TP] == S(0) and TP in placement and EP not in placement
    assert [k.role for k in placement] == [DP, TP]
    with pytest.raises(KeyError, match="EP"):
        placement[EP]


def test_a_user_may_have_roles_of_his_own() -> None:
    pipeline = Role("pp")
    assert str(placement_of(Placed[Tensor, pipeline[V]])) == "pp:V"
    assert len({*DENSE, *EXPERT, pipeline}) == 7


def test_annotations_leave_no_trace_in_bytecode() -> None:
    """The same source without annotations compiles to the same instructions."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(annotated)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    space: dict[str, Any] = {}
    exec(compile(tree, "stripped", "exec"), space)
    assert space["annotated"].__code__.co_code == annotated.__code__.co_code


def malformed() -> list[tuple[Any, str]]:
    return [
        (lambda: Placed[Tensor, TP], "TP is not a role with a kind"),
        (lambda: Placed[Tensor, "tp"], "'tp' is not a role with a kind"),
        (lambda: TP[cast(Any, "S")], "'S' is not a kind"),
        (lambda: TP[cast(Any, 0)], "0 is not a kind"),
        (lambda: Placed[Tensor, TP[R], DP[R], TP[V]], "role TP stands twice in tp:R dp:R tp:V"),
    ]


@pytest.mark.parametrize(("make", "text"), malformed(), ids=[text for _, text in malformed()])
def test_malformed_placements(make: Any, text: str) -> None:
    with pytest.raises(PlacementError, match=text):
        make()


def test_placement_errors_survive_operators() -> None:
    """A TypeError raised by `x + y` would be taken for 'try the other operand'."""
    assert not issubclass(PlacementError, TypeError)
    assert issubclass(PlacementError, spmd_types.SpmdTypeError)
