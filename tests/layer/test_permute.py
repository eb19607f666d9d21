"""Which row goes where, against loops over slots; and rows moved by it, against matrices.

Every move of rows is linear, so a matrix of ones and zeros that a loop fills says all about it:
forward is a product with the matrix, backward with its transpose, second derivatives with the
matrix again. Values are small whole numbers, for which all of these are exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spmd_moe.layer.combine import combine
from spmd_moe.layer.permute import (
    Slots,
    add_rows,
    expert_major,
    fold,
    from_slots,
    inverse,
    reorder,
    sort_by_expert,
    spread,
    take_scores,
)
from tests.support.operator_log import operators

WIDTH = 2
Ids = list[list[int]]  # the choices of each token
Rows = list[tuple[int, int]]  # the token and the choice of each row


@st.composite
def choices(draw: st.DrawFn, fewest: int = -1, most_tokens: int = 6) -> Ids:
    """-1 is a choice of no expert. A token may choose an expert twice."""
    k, last = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    token = st.lists(st.integers(fewest, last), min_size=k, max_size=k)
    return draw(st.lists(token, max_size=most_tokens))


# Shrinking would find these, but only if they failed.
CASES: dict[str, Ids] = {
    "no tokens": [],
    "no experts": [[-1, -1]] * 3,
    "all on one": [[2]] * 5,
    "twice on one": [[1, 1], [1, 1]],
    "some without": [[3, -1, 0], [-1, -1, -1], [0, 3, 3]],
    "one choice": [[4], [0], [-1], [0]],
}


def as_tensor(ids: Ids) -> Tensor:
    k = len(ids[0]) if ids else 2
    return torch.tensor([e for row in ids for e in row], dtype=torch.int64).view(-1, k)


def rows_of(ids: Ids) -> Rows:
    """The slots that have an expert: expert by expert, and for each in the order of tokens."""
    rows = []
    for expert in range(10):
        for t, row in enumerate(ids):
            rows += [(t, k) for k, e in enumerate(row) if e == expert]
    return rows


def is_complete(ids: Ids) -> bool:
    return all(e >= 0 for row in ids for e in row)


# --- where rows go ----------------------------------------------------------------------------


def check_slots(ids: Ids, slots: Slots) -> None:
    rows, k = rows_of(ids), len(ids[0]) if ids else 2
    assert slots.slot_N.tolist() == [t * k + choice for t, choice in rows]
    assert slots.token_N.tolist() == [t for t, _ in rows]
    place = {slot: row for row, slot in enumerate(rows)}
    wanted = [[place.get((t, c), len(rows)) for c in range(k)] for t in range(len(ids))]
    assert slots.row_TK.tolist() == wanted
    assert slots.row_TK.shape == (len(ids), k)
    indices = (slots.slot_N, slots.token_N, slots.row_TK)
    assert {index.dtype for index in indices} == {torch.int64}


@settings(deadline=None)
@given(choices())
def test_sort_by_expert(ids: Ids) -> None:
    slots = sort_by_expert(as_tensor(ids), every_slot=False)
    check_slots(ids, slots)
    assert not slots.every_slot


@settings(deadline=None)
@given(choices(fewest=0))
def test_sort_by_expert_where_all_have_one(ids: Ids) -> None:
    slots = sort_by_expert(as_tensor(ids), every_slot=True)
    check_slots(ids, slots)
    assert slots.every_slot


@pytest.mark.parametrize("name", CASES)
def test_sort_by_expert_at_the_edges(name: str) -> None:
    check_slots(CASES[name], sort_by_expert(as_tensor(CASES[name]), is_complete(CASES[name])))


def test_a_long_sort_is_stable() -> None:
    """Short sorts are stable by chance: some algorithms differ only from a few dozen rows on."""
    draw = random.Random(0)
    ids = [[draw.randrange(-1, 3), draw.randrange(-1, 3)] for _ in range(2000)]
    check_slots(ids, sort_by_expert(as_tensor(ids), every_slot=False))


@st.composite
def tables(draw: st.DrawFn) -> list[list[int]]:
    """Rows from each rank for each expert."""
    experts = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 3), min_size=experts, max_size=experts)
    return draw(st.lists(row, min_size=1, max_size=4))


@settings(deadline=None)
@given(tables())
@example([[2, 1], [1, 1]])
@example([[0, 0], [0, 0]])
@example([[0, 3, 0], [0, 2, 0]])
@example([[0]])
def test_expert_major(counts: list[list[int]]) -> None:
    arrived = [
        (e, rank) for rank, row in enumerate(counts) for e, n in enumerate(row) for _ in range(n)
    ]
    order = expert_major(torch.tensor(counts), len(arrived))
    # Python's sort is stable: of one expert, rows stay rank by rank, and as each rank sent them.
    assert order.tolist() == sorted(range(len(arrived)), key=lambda row: arrived[row][0])
    assert order.dtype is torch.int64


@settings(deadline=None)
@given(st.integers(0, 9).flatmap(lambda n: st.permutations(range(n))))
def test_inverse(order: list[int]) -> None:
    back = inverse(torch.tensor(order, dtype=torch.int64)).tolist()
    assert [back[old] for old in order] == list(range(len(order)))
    assert [order[new] for new in back] == list(range(len(order)))


# --- rows that move ---------------------------------------------------------------------------


def matrix(rows: int, columns: int, ones: list[tuple[int, int]]) -> Tensor:
    m = torch.zeros(rows, columns, dtype=torch.float64)
    for i, j in ones:
        m[i, j] += 1
    return m


Move = Callable[[Tensor, Slots], Tensor]
Definition = Callable[[Rows, int, int], Tensor]
MOVES: dict[str, tuple[Move, Definition]] = {
    "spread": (
        spread,
        lambda rows, tokens, k: matrix(
            len(rows), tokens, [(n, t) for n, (t, _) in enumerate(rows)]
        ),
    ),
    "fold": (
        fold,
        lambda rows, tokens, k: matrix(
            tokens, len(rows), [(t, n) for n, (t, _) in enumerate(rows)]
        ),
    ),
    "from_slots": (
        from_slots,
        lambda rows, tokens, k: matrix(
            len(rows), tokens * k, [(n, t * k + c) for n, (t, c) in enumerate(rows)]
        ),
    ),
}


def whole_numbers(rows: int) -> Tensor:
    draw = torch.Generator().manual_seed(rows)
    return torch.randint(1, 9, (rows, WIDTH), generator=draw).to(torch.float64)


def check_linear(move: Callable[[Tensor], Tensor], m: Tensor) -> None:
    """Value, gradient and second derivative of a move are those of a product with `m`."""
    x, g = whole_numbers(m.shape[1]).requires_grad_(), whole_numbers(m.shape[0]).requires_grad_()
    y = move(x)
    assert torch.equal(y, m @ x)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert torch.equal(dx, m.T @ g)
    (ddg,) = torch.autograd.grad(dx, g, 3 * x.detach())
    assert torch.equal(ddg, m @ (3 * x))
    if m.any():
        assert y.any() and dx.any() and ddg.any()


def check_move(name: str, ids: Ids, complete: bool) -> None:
    move, definition = MOVES[name]
    slots = sort_by_expert(as_tensor(ids), complete)
    k = slots.row_TK.shape[1]
    check_linear(lambda x: move(x, slots), definition(rows_of(ids), len(ids), k))


@pytest.mark.parametrize("name", MOVES)
@settings(deadline=None)
@given(choices())
def test_moves(name: str, ids: Ids) -> None:
    check_move(name, ids, complete=False)


@pytest.mark.parametrize("name", MOVES)
@settings(deadline=None)
@given(choices(fewest=0))
def test_moves_where_all_have_an_expert(name: str, ids: Ids) -> None:
    check_move(name, ids, complete=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MOVES)
def test_moves_at_the_edges(name: str, case: str) -> None:
    check_move(name, CASES[case], is_complete(CASES[case]))


@settings(deadline=None)
@given(st.integers(0, 9).flatmap(lambda n: st.permutations(range(n))))
def test_reorder(order: list[int]) -> None:
    order_R = torch.tensor(order, dtype=torch.int64)
    m = matrix(len(order), len(order), list(enumerate(order)))
    check_linear(lambda x: reorder(x, order_R, inverse(order_R)), m)


@settings(deadline=None)
@given(choices())
def test_take_scores(ids: Ids) -> None:
    """One weight for each row; a slot without a row gets no gradient."""
    slots = sort_by_expert(as_tensor(ids), every_slot=False)
    scores = torch.arange(1.0, slots.row_TK.numel() + 1).view_as(slots.row_TK).requires_grad_()
    taken, rows = take_scores(scores, slots), rows_of(ids)
    k = slots.row_TK.shape[1]
    assert taken.tolist() == [t * k + choice + 1 for t, choice in rows]
    (grad,) = torch.autograd.grad(taken, scores, torch.arange(1.0, len(rows) + 1))
    place = {slot: row for row, slot in enumerate(rows)}
    wanted = [[place.get((t, c), -1) + 1 for c in range(k)] for t in range(len(ids))]
    assert grad.tolist() == wanted


# --- sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_rows_are_added_choice_by_choice(dtype: torch.dtype, k: int) -> None:
    """To the bit: a sum in another order would differ in its last places."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=draw, dtype=torch.float64).to(dtype)
    row_TK = torch.randint(0, 40, (30, k), generator=draw)
    wanted = []
    for rows in row_TK.tolist():
        total = x[rows[0]].to(torch.promote_types(dtype, torch.float32))
        for row in rows[1:]:
            total = total + x[row]
        wanted.append(total.to(dtype))
    got = add_rows(x, row_TK, every_slot=True)
    assert got.dtype is dtype and torch.equal(got, torch.stack(wanted))
    if k == 5 and dtype is not torch.bfloat16:  # in float32, sums of bf16 numbers are exact
        assert not torch.equal(add_rows(x, row_TK.flip(1), every_slot=True), got)


def test_a_sum_of_bf16_rows_is_not_rounded_on_the_way() -> None:
    x = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    one_by_one = x[0] + x[1] + x[2]
    assert one_by_one.item() == 256.0  # what the test is about
    assert add_rows(x, torch.tensor([[0, 1, 2]]), every_slot=True).item() == 258.0


def test_weights_that_come_late_are_not_rounded() -> None:
    """The product of a bf16 row and its float32 weight is rounded, not the weight."""
    draw = torch.Generator().manual_seed(0)
    slots = sort_by_expert(torch.arange(20).unsqueeze(1), every_slot=True)
    rows, scores = torch.randn(20, 9, generator=draw).bfloat16(), torch.rand(20, 1, generator=draw)
    got = combine(rows, slots, scores)
    assert got.dtype is torch.bfloat16 and torch.equal(got, (rows * scores).bfloat16())
    assert not torch.equal(got, rows * scores.bfloat16())


def test_add_rows_leaves_its_input_alone() -> None:
    x = torch.ones(3, 2)
    add_rows(x, torch.tensor([[0, 1], [0, 2]]), every_slot=True)
    assert torch.equal(x, torch.ones(3, 2))


# --- repeats are equal to the bit -------------------------------------------------------------

# What adds at places that an index names. On a GPU, two additions at one place come in any order.
ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_put", "embedding_dense_backward")


def forward_and_backward(name: str, x: Tensor, g: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = MOVES[name][0](leaf, slots)
    (dx,) = torch.autograd.grad(y, leaf, g)
    return y.detach(), dx


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_no_additions_at_random_places(name: str, complete: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(0 if complete else -1, 4, (500, 4), generator=draw)
    slots = sort_by_expert(ids_TK, complete)
    shape = MOVES[name][1](rows_of(ids_TK.tolist()), 500, 4).shape
    x, g = (torch.randn(n, 3, generator=draw) for n in reversed(shape))
    with operators() as ran:
        first = forward_and_backward(name, x, g, slots)
    assert any("index_select" in op.name for op in ran)
    assert [op for op in ran if any(word in op.name for word in ATOMIC)] == []
    for _ in range(5):
        again = forward_and_backward(name, x, g, slots)
        assert all(torch.equal(a, b) and a.any() for a, b in zip(first, again, strict=True))


def test_the_watch_over_additions_can_fail() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    with operators() as ran:
        x[torch.tensor([0, 0, 1])].sum().backward()
    assert any(word in op.name for op in ran for word in ATOMIC)
