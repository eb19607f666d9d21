"""The walk over a value and its annotation: which tensors, which placements, which paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar

import pytest
import torch
from torch import Tensor

from spmd_moe import DP, TP, I, P, Placed, R
from spmd_moe.signatures.declared_tensors import declared_tensors, placements_in

A: TypeAlias = Placed[Tensor, TP[R]]
B: TypeAlias = Placed[Tensor, TP[I]]
T = TypeVar("T")
one = torch.ones(1)


class Pair(NamedTuple):
    first: Placed[Tensor, TP[R]]
    plain: Tensor


@dataclass
class Node:
    value: Placed[Tensor, TP[P]]
    next: Node | None = None


@dataclass
class Box(Generic[T]):
    item: T
    items: list[T]


class Keyed(TypedDict, total=False):
    a: Placed[Tensor, TP[P]]
    n: int


LIST = Node(one, Node(one))
CASES: dict[str, tuple[Any, Any, list[tuple[str, str]]]] = {
    "a tensor": (one, A, [("x", "tp:R")]),
    "two axes": (one, Placed[Tensor, DP[R], TP[I]], [("x", "dp:R tp:I")]),
    "without a placement": (one, Tensor, []),
    "optional": (one, A | None, [("x", "tp:R")]),
    "none": (None, A | None, []),
    "tuple": ((one, 1, one), tuple[A, int, B], [("x[0]", "tp:R"), ("x[2]", "tp:I")]),
    "any tuple": ((one, one), tuple[A, ...], [("x[0]", "tp:R"), ("x[1]", "tp:R")]),
    "empty": ((), tuple[A, ...], []),
    "list": ([one], list[A], [("x[0]", "tp:R")]),
    "sequence": ((one,), Sequence[A], [("x[0]", "tp:R")]),
    "dict": ({"a": one, 2: one}, dict[Any, A], [("x['a']", "tp:R"), ("x[2]", "tp:R")]),
    "mapping": ({"a": one}, Mapping[str, A] | None, [("x['a']", "tp:R")]),
    "typed dict": ({"a": one, "n": 1}, Keyed, [("x['a']", "tp:P")]),
    "named tuple": (Pair(one, one), Pair, [("x.first", "tp:R")]),
    "records in records": (LIST, Node, [("x.value", "tp:P"), ("x.next.value", "tp:P")]),
    "a record in an unannotated place": ([LIST.next], Any, [("x[0].value", "tp:P")]),
    "a record that is any": (LIST.next, Any, [("x.value", "tp:P")]),
    "generic": (Box(one, [one]), Box[B], [("x.item", "tp:I"), ("x.items[0]", "tp:I")]),
    "generic without arguments": (Box(one, [one]), Box, []),
    "union of containers": ([one], dict[str, B] | list[A], [("x[0]", "tp:R")]),
    "tensor or tuple": (one, tuple[A, ...] | B, [("x", "tp:I")]),
    "tuples of two lengths": (
        (one, one),
        tuple[A] | tuple[A, B],
        [("x[0]", "tp:R"), ("x[1]", "tp:I")],
    ),
    "other metadata": ([one], Annotated[list[A], "as it is"], [("x[0]", "tp:R")]),
    "nested": (
        {"k": [(Pair(one, one), one)]},
        dict[str, list[tuple[Pair, B]]],
        [("x['k'][0][0].first", "tp:R"), ("x['k'][0][1]", "tp:I")],
    ),
    "an odd length": ((one, one, one), tuple[A, A], []),
    "an odd container": ([one], dict[str, A], []),
    "text": ("text", Sequence[str], []),
    "many numbers": ([1, 2.0, one], list[Any], []),
    "a literal": (["a", one], Literal["a"] | list[A], [("x[1]", "tp:R")]),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_of_a_value(name: str) -> None:
    value, hint, want = CASES[name]
    found = declared_tensors(value, hint, "x")
    assert [(path, str(placement)) for path, _, placement in found] == want


def test_a_cycle_ends() -> None:
    node = Node(one)
    node.next = node
    assert [path for path, _, _ in declared_tensors(node, Node, "x")] == ["x.value"]


def test_a_tensor_that_is_held_twice_is_seen_twice() -> None:
    shared = [one]
    found = [path for path, _, _ in declared_tensors((shared, shared), tuple[list[A], ...], "x")]
    assert found == ["x[0][0]", "x[1][0]"]


@pytest.mark.parametrize(
    "hint,want",
    [
        (A, ["tp:R"]),
        (Tensor, []),
        (Any, []),
        (tuple[Pair, list[B], Tensor, A | None], ["tp:R", "tp:I", "tp:R"]),
        (Node, ["tp:P"]),
        (Keyed, ["tp:P"]),
        (Box[A], ["tp:R"]),
        (Annotated[list[A], "as it is"], ["tp:R"]),
    ],
    ids=str,
)
def test_placements_of_an_annotation(hint: Any, want: list[str]) -> None:
    assert [str(placement) for placement in placements_in(hint)] == want
