"""The differentiable `Move` and `Exchange`: typing rules that are true, compiled, awaited."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import spmd_types
import spmd_types.rulecheck as rulecheck_module
import torch
import torch.distributed as dist
from spmd_types import MeshAxis, Shard, get_local_type, set_current_mesh
from spmd_types.checker import typecheck
from spmd_types.rulecheck import RuleCheckError, rulecheck
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from spmd_moe import TP, I, MoEMesh, P, R, S, ShardShape, V, redistribute
from spmd_moe.core.collectives import Move, declare_sum, exchange
from spmd_moe.core.host_values import read_ints
from spmd_moe.core.moves import MOVES, Step
from spmd_moe.core.placement import Kind
from tests.support.operator_log import operators
from tests.support.simulated_ranks import fake_world, simulated
from tests.support.workers import run

KINDS: dict[str, list[Kind]] = {"R": [R], "I": [I], "P": [P], "S": [S(0), S(1), S(2)]}
STEPS = [Step(s, d) for a, b in MOVES for s in KINDS[a] for d in KINDS[b] if s != d]


# --- the typing rules say what the kernels do --------------------------------------------------


@pytest.fixture
def seeded_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """rulecheck 0.3.1 draws from a stateless generator that torch 2.13 has for GPUs only."""

    def noise(like: Tensor, *key: object) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        # Whole numbers, so that parts of a sum give the same sum on every coordinate.
        return torch.randint(-9, 9, like.shape, generator=generator).to(like.dtype)

    monkeypatch.setattr(rulecheck_module, "_seeded_noise", noise)


@pytest.mark.usefixtures("seeded_on_cpu")
@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s.src}->{s.dst}")
def test_typing_rule_of_every_move(step: Step) -> None:
    """Ranks' results, put together as the derived type says, are the single-process result."""
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    report = rulecheck(Move, (x, "tp", step, None, None), local_tensor_mode=True)
    assert report is not None
    accepted = {repr(placement["x"]["tp"]) for placement in report.checked}
    # What needs no gradient may be read as R or as I.
    same = {"R", "I"} if step.src in (R, I) else {repr(step.src)}
    assert accepted == same


@pytest.mark.usefixtures("seeded_on_cpu")
@pytest.mark.parametrize("step", [Step(S(0), R), Step(P, S(1)), Step(S(0), S(1))], ids=str)
def test_typing_rule_beside_another_axis(step: Step) -> None:
    x = torch.arange(4.0 * 8 * 12).view(4, 8, 12)
    args = (x, "tp", step, None, None)
    report = rulecheck(Move, args, mesh={"dp": 2, "tp": 2}, local_tensor_mode=True)
    assert report is not None and len({repr(p["x"]["dp"]) for p in report.checked}) > 1


@pytest.mark.usefixtures("seeded_on_cpu")
def test_a_rule_that_lies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """rulecheck is not a rubber stamp: an all-gather that is typed as a sum is caught."""
    row = MOVES["S", "R"]
    lie = type(row)(MOVES["S", "P"].run, row.rule, row.does, row.costs)
    monkeypatch.setitem(MOVES, ("S", "R"), lie)
    with pytest.raises(RuleCheckError, match="different values"):
        rulecheck(Move, (torch.ones(4, 2), "tp", Step(S(0), R), None, None), local_tensor_mode=True)


def test_exchange_claims_nothing_about_a_whole() -> None:
    """Rows go where data says: rulecheck could find no placement of the axis that is kept."""
    with fake_world(2):
        group = dist.group.WORLD
        assert group is not None
        x = torch.ones(2, 3)
        with set_current_mesh({"tp": MeshAxis.of(group)}), typecheck("strict", local=False):
            spmd_types.assert_type(x, {group: S(0)})
            with pytest.raises(spmd_types.SpmdTypeError, match="check it in a local region"):
                exchange(x, group, receives=[1, 1], sends=[1, 1])


@pytest.mark.parametrize("kind", [R, I, P, V], ids=str)
def test_exchange_takes_and_gives_v(kind: Kind) -> None:
    with fake_world(2):
        group = dist.group.WORLD
        assert group is not None
        x = torch.ones(2, 3)
        with set_current_mesh({"tp": MeshAxis.of(group)}), typecheck("strict"):
            spmd_types.assert_type(x, {group: kind})
            if kind is V:
                y = exchange(x, group, receives=[1, 1], sends=[1, 1])
                assert get_local_type(y) == {MeshAxis.of(group): V}
                return
            with pytest.raises(spmd_types.SpmdTypeError, match="rows must be V"):
                exchange(x, group, receives=[1, 1], sends=[1, 1])


def test_declare_sum_makes_a_p() -> None:
    with fake_world(2):
        group = dist.group.WORLD
        assert group is not None
        axis = MoEMesh.init("cpu", tp=2)[TP]
        for over, on in ((group, group), (axis, axis.group)):
            x = torch.ones(2)
            with set_current_mesh({"tp": MeshAxis.of(on)}), typecheck("strict"):
                spmd_types.assert_type(x, {on: V})
                assert get_local_type(declare_sum(x, over)) == {MeshAxis.of(on): P}


# --- exchange ---------------------------------------------------------------------------------

# How many rows rank r (a row) sends to rank c (a column).
TABLES = [
    [[1, 2], [3, 1]],
    [[0, 0], [0, 0]],
    [[0, 3], [0, 0]],
    [[2, 0, 1], [0, 0, 0], [1, 1, 4]],
    [[0, 0, 5], [0, 0, 5], [0, 0, 0]],
]


def expected_rows(rows: list[Tensor], table: list[list[int]], rank: int) -> Tensor:
    """Rank by rank, the part that each one has for `rank`."""
    parts = []
    for sender, sizes in enumerate(table):
        start = sum(sizes[:rank])
        parts.append(rows[sender][start : start + sizes[rank]])
    return torch.cat(parts)


def rows_of(table: list[list[int]]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(sum(sizes), 3, generator=draw, dtype=torch.float64) for sizes in table]


def exchanged(tables: list[list[list[int]]]) -> list[str]:
    """Values and first and second gradients of every table of this world's size."""
    group, wrong = dist.group.WORLD, []
    assert group is not None
    rank, world = dist.get_rank(), dist.get_world_size()
    for table in tables:
        back = [list(column) for column in zip(*table, strict=True)]
        rows = rows_of(table)
        x = rows[rank].clone().requires_grad_()
        y = exchange(x, group, receives=back[rank], sends=table[rank])
        if not torch.equal(y.detach() + 0, expected_rows(rows, table, rank)):
            wrong.append(f"{table} value")
        # <y, y> / 2 has x as its gradient, and the identity as its second.
        (dx,) = torch.autograd.grad((y * y).sum() / 2, x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx, x, torch.ones_like(dx))
        if not (torch.equal(dx.detach() + 0, rows[rank]) and torch.equal(ddx, torch.ones_like(x))):
            wrong.append(f"{table} gradients")
    return wrong if world > 1 else ["alone"]


@pytest.mark.gloo
@pytest.mark.parametrize("world", [2, 3])
def test_exchange_on_real_ranks(world: int) -> None:
    tables = [t for t in TABLES if len(t) == world]
    assert run(world, exchanged, tables) == [[]] * world


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_exchange_simulated(table: list[list[int]]) -> None:
    """Split sizes that were counted on each rank, as in the layer."""
    rows, world = rows_of(table), len(table)
    back = [list(column) for column in zip(*table, strict=True)]
    sends = [torch.tensor(sizes) for sizes in table]
    receives = [torch.tensor(sizes) for sizes in back]
    with simulated(world) as mode:
        group = dist.group.WORLD
        assert group is not None
        x = mode.rank_map(lambda r: rows[r].clone()).requires_grad_()
        y = exchange(
            x,
            group,
            receives=read_ints(mode.rank_map(lambda r: receives[r])),
            sends=read_ints(mode.rank_map(lambda r: sends[r])),
        )
        y.backward(y.detach())
        assert x.grad is not None
        with mode.disable():
            for rank in range(world):
                got = cast(Any, y)._local_tensors[rank]
                assert torch.equal(got, expected_rows(rows, table, rank))
                assert torch.equal(cast(Any, x.grad)._local_tensors[rank], rows[rank])


@pytest.mark.parametrize("shape", [None, ShardShape.even(0, 2)], ids=str)
@pytest.mark.parametrize(("src", "dst"), [(S(0), R), (P, S(0))], ids=str)
def test_no_rows_take_part_with_a_row_of_zeros(
    src: Kind, dst: Kind, shape: ShardShape | None
) -> None:
    """Which collectives run does not depend on rows; nor takes every backend an empty message."""
    with fake_world(2):
        axis = MoEMesh.init("cpu", tp=2)[TP]
        with operators() as ran:
            y = redistribute(torch.ones(0, 3), axis, src=src, dst=dst, shape=shape)
    name = "all_gather" if dst is R else "reduce_scatter"
    assert y.shape == (0, 3) and sum(name in operator.name for operator in ran) == 1


# --- torch.compile, and results that wait -----------------------------------------------------


def compiled_cases() -> list[tuple[Kind, Kind, Any, tuple[int, int]]]:
    five, eight = ShardShape.even(5, 2), ShardShape.even(8, 2)
    return [
        (S(0), R, five, (0, 8)),
        (S(0), I, eight, (4, 8)),
        (P, S(0), five, (5, 8)),
        (P, R, None, (5, 8)),
        (P, I, None, (5, 8)),
        (R, S(0), five, (5, 8)),
        (I, S(1), eight, (5, 8)),
        (R, P, None, (5, 8)),
        (I, P, None, (5, 8)),
        (I, R, None, (5, 8)),
        (R, I, None, (5, 8)),
        (S(0), P, five, (0, 8)),
        (S(0), S(1), (five, eight), (0, 8)),
    ]


def compiled_equals_eager(cases: list[tuple[Kind, Kind, Any, tuple[int, int]]]) -> list[str]:
    axis, rank, wrong = MoEMesh.init("cpu", tp=2)[TP], dist.get_rank(), []
    for src, dst, shape, (rows, width) in cases:
        if isinstance(src, Shard) and not rows:
            rows = (3, 2)[rank]  # five rows over two ranks

        def run_it(x: Tensor, move: tuple[Kind, Kind, Any] = (src, dst, shape)) -> Tensor:
            y = redistribute(x * 2, axis, src=move[0], dst=move[1], shape=move[2])
            return y * y

        torch.compiler.reset()  # the moves share one code object, whose recompiles are limited
        compiled = cast(
            Callable[[Tensor], Tensor],
            torch.compile(run_it, fullgraph=True, backend="aot_eager", dynamic=False),
        )
        results = []
        for function in (run_it, compiled):
            x = torch.arange(rows * width, dtype=torch.float64).view(rows, width).requires_grad_()
            y = function(x)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            results.append((y.detach(), dx))
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            wrong.append(f"{src} -> {dst}")
    return wrong


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_every_move_compiles_into_one_graph() -> None:
    assert run(2, compiled_equals_eager, compiled_cases(), timeout=300.0) == [[], []]


def waiting() -> tuple[bool, list[bool]]:
    """Whether a result is awaited at its first use; whether gradients of leaves are there at once.

    Not every leaf is handed to the move itself: a view, a sum and a copy pass a gradient on.
    """
    axis = MoEMesh.init("cpu", tp=2)[TP]
    y, there = torch.ones(()), []
    for through in (torch.Tensor.contiguous, torch.t, torch.clone, lambda x: x + 1, torch.relu):
        x = torch.ones(3, 3, requires_grad=True)
        y = redistribute(through(x), axis, src=S(0), dst=R)
        y.sum().backward()
        there.append(type(x.grad) is Tensor)
    x = torch.ones(2, 3, requires_grad=True)
    exchange(x, axis.group, receives=[1, 1], sends=[1, 1]).sum().backward()
    return isinstance(y, AsyncCollectiveTensor), [*there, type(x.grad) is Tensor]


@pytest.mark.gloo
def test_results_wait_at_first_use_and_gradients_at_once() -> None:
    assert run(2, waiting) == [(True, [True] * 6)] * 2
