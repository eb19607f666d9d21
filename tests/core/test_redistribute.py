"""Every move, every size: value, gradient, second gradient, type, dtype and cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any, cast

import pytest
import spmd_types
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spmd_types import MeshAxis, PartitionSpec, Shard, get_local_type, set_current_mesh
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor
from torch.utils._python_dispatch import TorchDispatchMode

from spmd_moe import (
    TP,
    DtypeError,
    I,
    MoEMesh,
    P,
    PlacementError,
    R,
    S,
    ShapeError,
    ShardShape,
    V,
    redistribute,
)
from spmd_moe.core.moves import MOVES
from spmd_moe.core.placement import Kind
from spmd_moe.core.redistribute import Shape, moves_table, plan
from tests.support import moves_oracle as oracle
from tests.support.simulated_ranks import fake_world, simulated

KINDS: tuple[Kind, ...] = (R, I, P, S(0), S(1))
PAIRS = [(src, dst) for src in KINDS for dst in KINDS]
# spmd_types 0.3.1 calls the names that torch 2.12 renamed.
OLD_NAMES = "ignore:.*_tensor.* is deprecated:FutureWarning"


def shapes(ranks: int) -> list[ShardShape]:
    """Totals around n and 2n, shared out evenly, and ragged ones: empty in front, all on one rank.

    `test_any_sizes_at_all` draws others.
    """
    ragged = [
        [0] * (ranks - 1) + [3],
        [3] + [0] * (ranks - 1),
        [2 * r for r in range(ranks)],
        [1 + r % 2 for r in range(ranks)],
    ]
    # 4 and 5 are more cases for one rank, whose other totals are 0 to 3.
    totals = sorted({0, 1, 4, 5, ranks - 1, ranks, ranks + 1, 2 * ranks, 2 * ranks + 1})
    even = [ShardShape.even(total, ranks) for total in totals]
    return even + [ShardShape.ragged(sizes) for sizes in ragged]


def cases(
    src: Kind, dst: Kind, ranks: int
) -> Iterator[tuple[tuple[int, ...], ShardShape, ShardShape]]:
    """Whole shapes, with how dim 0 and dim 1 are shared out, in one to three dims."""
    other = ShardShape.even(3, ranks)
    needs_dim_1 = S(1) in (src, dst)
    for shape in shapes(ranks):
        if not needs_dim_1:
            yield (shape.total,), shape, other
        yield (shape.total, 3), shape, other
        if src != dst and needs_dim_1:
            yield (3, shape.total, 2), other, shape


def shape_for(src: Kind, dst: Kind, by_dim: tuple[ShardShape, ShardShape]) -> Shape | None:
    """The `shape` argument of a move."""
    sides = [by_dim[k.dim] for k in (src, dst) if isinstance(k, Shard)]
    if src != dst and len(sides) == 2:
        return sides[0], sides[1]
    return sides[0] if sides else None


def by_rank(x: Tensor) -> list[Tensor]:
    return list(cast(LocalTensor, x)._local_tensors.values())


class Simulation:
    """All ranks in one process. Plain tensors are made outside of the mode, or they would nest."""

    def __init__(self, ranks: int) -> None:
        self.world = simulated(ranks)
        self.mode = self.world.__enter__()
        self.axis = MoEMesh.init("cpu", tp=ranks)[TP]

    def spread(self, tensors: list[Tensor]) -> Tensor:
        return self.mode.rank_map(lambda r: tensors[r])


@pytest.fixture(params=[1, 2, 3, 4], ids="{} ranks".format)
def simulation(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    found = Simulation(request.param)
    yield found
    found.world.__exit__(None, None, None)


@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_value_and_adjoint(simulation: Simulation, src: Kind, dst: Kind) -> None:
    alive = 0
    for number, (whole_shape, *by_dim) in enumerate(cases(src, dst, simulation.axis.size)):
        alive += check(simulation, src, dst, whole_shape, (by_dim[0], by_dim[1]), number) != 0
    assert alive > 5, "nearly all products were zero: nothing was compared"


def check(
    simulation: Simulation,
    src: Kind,
    dst: Kind,
    whole_shape: tuple[int, ...],
    by_dim: tuple[ShardShape, ShardShape],
    seed: int,
) -> float:
    """The whole is kept to the bit, and <A g, dx> equals <g, A dx> exactly; gives the product."""
    ranks = simulation.axis.size
    with simulation.mode.disable():
        whole = oracle.integers(*whole_shape, seed=seed)
        values = oracle.scattered(whole, src, by_dim[_dim(src)], ranks)
        cotangent = oracle.integers(*whole_shape, seed=seed + 1)
        gradients = oracle.scattered(cotangent, dst.backward_type(), by_dim[_dim(dst)], ranks)
    x = simulation.spread(values).requires_grad_()
    shape = shape_for(src, dst, by_dim)
    y = redistribute(x, simulation.axis, src=src, dst=dst, shape=shape)
    y.backward(simulation.spread(gradients))
    assert x.grad is not None
    with simulation.mode.disable():
        assert torch.equal(oracle.meaning(by_rank(y), dst), whole), (whole_shape, by_dim)
        if isinstance(dst, Shard):
            assert [t.shape[dst.dim] for t in by_rank(y)] == list(by_dim[dst.dim].sizes)
        there = oracle.product(by_rank(y), gradients, dst)
        back = oracle.product(values, by_rank(x.grad), src)
        assert there == back, (whole_shape, by_dim)
    return there


SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(PAIRS), SIZES, st.data(), st.integers(0, 2**20))
def test_any_sizes_at_all(
    pair: tuple[Kind, Kind], rows: list[int], data: st.DataObject, seed: int
) -> None:
    """Random sizes, ragged in both dims, with more dims behind."""
    columns = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    behind = data.draw(st.lists(st.integers(0, 3), max_size=2))
    by_dim = (ShardShape.ragged(rows), ShardShape.ragged(columns))
    simulation = Simulation(len(rows))
    try:
        check(simulation, *pair, (by_dim[0].total, by_dim[1].total, *behind), by_dim, seed)
    finally:
        simulation.world.__exit__(None, None, None)


def _dim(kind: Kind) -> int:
    return kind.dim if isinstance(kind, Shard) else 0


@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_second_order(simulation: Simulation, src: Kind, dst: Kind) -> None:
    """The gradient of a gradient goes back through the move of the gradient."""
    ranks = simulation.axis.size
    by_dim = (ShardShape.even(5, ranks), ShardShape.even(3, ranks))
    shape = shape_for(src, dst, by_dim)
    with simulation.mode.disable():
        values = oracle.scattered(oracle.integers(5, 3, seed=1), src, by_dim[_dim(src)], ranks)
        ones = oracle.scattered(oracle.integers(5, 3, seed=2), dst, by_dim[_dim(dst)], ranks)
    x = simulation.spread(values).requires_grad_()
    g = simulation.spread(ones).requires_grad_()
    y = redistribute(x, simulation.axis, src=src, dst=dst, shape=shape)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)  # A* g, linear in g
    (dg,) = torch.autograd.grad(dx, g, x.detach())  # (A*)* x = A x
    with simulation.mode.disable():
        for got, want in zip(by_rank(dg), by_rank(y), strict=True):
            assert torch.equal(got, want.detach())


@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_strides_do_not_matter(src: Kind, dst: Kind) -> None:
    """Transposed inputs and expanded gradients, of which `.sum()` makes one."""
    ranks = 3
    simulation = Simulation(ranks)
    by_dim = (ShardShape.even(4, ranks), ShardShape.even(5, ranks))
    shape = shape_for(src, dst, by_dim)
    try:
        with simulation.mode.disable():
            plain = oracle.scattered(oracle.integers(4, 5, seed=3), src, by_dim[_dim(src)], ranks)
            turned = [t.t().contiguous().t() for t in plain]
            assert not turned[0].is_contiguous()
        results = []
        for tensors in (plain, turned):
            x = simulation.spread(tensors).requires_grad_()
            y = redistribute(x, simulation.axis, src=src, dst=dst, shape=shape)
            y.sum().backward()
            assert x.grad is not None
            results.append(by_rank(y) + by_rank(x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        simulation.world.__exit__(None, None, None)


MADE = [(src, dst) for src, dst in PAIRS if src != dst and {src, dst} != {R, I}]


@pytest.mark.parametrize(("src", "dst"), MADE, ids=str)
def test_results_lie_in_one_piece_of_their_own(src: Kind, dst: Kind) -> None:
    """Written in place, a result spoils no input; and a shard does not keep the whole alive."""
    simulation = Simulation(3)
    by_dim = (ShardShape.even(4, 3), ShardShape.even(5, 3))
    try:
        with simulation.mode.disable():
            values = oracle.scattered(oracle.integers(4, 5, seed=3), src, by_dim[_dim(src)], 3)
        x, shape = simulation.spread(values), shape_for(src, dst, by_dim)
        y = redistribute(x, simulation.axis, src=src, dst=dst, shape=shape)
        for before, after in zip(by_rank(x), by_rank(y), strict=True):
            assert after.is_contiguous()
            assert before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr()
    finally:
        simulation.world.__exit__(None, None, None)


@pytest.mark.filterwarnings(OLD_NAMES)
@pytest.mark.parametrize("simulation", [2, 3, 4], ids="{} ranks".format, indirect=True)
@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_equal_sizes_are_bitwise_those_of_spmd_types(
    simulation: Simulation, src: Kind, dst: Kind
) -> None:
    ranks = simulation.axis.size
    by_dim = (ShardShape.even(2 * ranks, ranks), ShardShape.even(ranks, ranks))
    with simulation.mode.disable():
        whole = torch.randn(2 * ranks, ranks, generator=torch.Generator().manual_seed(0))
        values = oracle.scattered(whole, src, by_dim[_dim(src)], ranks)
    x = simulation.spread(values)
    ours = redistribute(x, simulation.axis, src=src, dst=dst)
    again = redistribute(x, simulation.axis, src=src, dst=dst)
    if isinstance(src, Shard) and isinstance(dst, Shard) and src != dst:
        return  # spmd_types' own runs on list collectives, which cannot be simulated
    theirs = spmd_types.redistribute(x, simulation.axis.group, src=src, dst=dst)
    with simulation.mode.disable():
        for a, b, c in zip(by_rank(ours), by_rank(theirs), by_rank(again), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("local", [True, False], ids=["local", "global"])
@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_types(src: Kind, dst: Kind, local: bool) -> None:
    """The checker sees `src` checked and `dst` given, on this axis and no other."""
    with fake_world(4):
        mesh = MoEMesh.init("cpu", dp=2, tp=2)
        tp, dp = MeshAxis.of(mesh[TP].group), MeshAxis.of(mesh.dense.get_group("dp"))
        x = torch.ones(2, 2)  # made inside, it would be R already
        with set_current_mesh({"dp": dp, "tp": tp}), typecheck("strict", local=local):
            spmd_types.assert_type(x, {dp: R, tp: src})
            y = redistribute(x, mesh[TP], src=src, dst=dst)
            want = V if isinstance(dst, Shard) else dst
            assert get_local_type(y) == {dp: R, tp: want}
            if not local and isinstance(dst, Shard):
                spec = PartitionSpec(*([None] * dst.dim), tp)
                assert tuple(spmd_types.get_partition_spec(y) or ())[: dst.dim + 1] == tuple(spec)
            wrong = next(k for k in (P, R) if k != src)
            with pytest.raises(spmd_types.SpmdTypeError, match=r"expect|mismatch"):
                redistribute(x, mesh[TP], src=wrong, dst=I)


def test_sums_take_partials_only() -> None:
    """A sum over rows that are not parts of a sum is refused, however it is dressed."""
    with fake_world(2):
        axis = MoEMesh.init("cpu", tp=2)[TP]
        goals: list[Kind] = [R, I, S(0)]
        for kind, dst in product((V, R, I), goals):
            x = torch.ones(2)
            with set_current_mesh({"tp": MeshAxis.of(axis.group)}), typecheck("strict"):
                spmd_types.assert_type(x, {axis.group: kind})
                with pytest.raises(spmd_types.SpmdTypeError, match="expects its input to be P"):
                    redistribute(x, axis, src=P, dst=dst)


# --- dtypes -----------------------------------------------------------------------------------


def test_dtype_is_what_the_sum_is_taken_in() -> None:
    """256 + 1 + 1 is 256 in bfloat16, step by step, and 258 when summed in float32."""
    simulation = Simulation(3)
    try:
        with simulation.mode.disable():
            parts = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
        x = simulation.spread(parts)
        low = redistribute(x, simulation.axis, src=P, dst=R)
        high = redistribute(x, simulation.axis, src=P, dst=R, dtype=torch.float32)
        assert low.dtype == high.dtype == torch.bfloat16
        assert by_rank(low)[0].item() == 256.0
        assert by_rank(high)[0].item() == 258.0
        x = simulation.spread(parts).requires_grad_()
        for dtype, want in ((torch.bfloat16, 256.0), (torch.float32, 258.0)):
            y = redistribute(x, simulation.axis, src=I, dst=R, grad_dtype=dtype)
            (dx,) = torch.autograd.grad(y, x, simulation.spread(parts))
            assert by_rank(dx)[0].item() == want and dx.dtype == torch.bfloat16
    finally:
        simulation.world.__exit__(None, None, None)


@pytest.mark.parametrize(("src", "dst"), [(S(0), R), (P, R), (I, R)], ids=str)
@pytest.mark.parametrize("world", [1, 2])
def test_low_precision_gradients_must_be_asked_for(src: Kind, dst: Kind, world: int) -> None:
    """On one rank as on many, so that what runs on one also runs on many."""
    with fake_world(world):
        axis = MoEMesh.init("cpu", tp=world)[TP]
        x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
        with pytest.raises(DtypeError, match="summed over the ranks in bf16"):
            redistribute(x, axis, src=src, dst=dst)
        redistribute(x, axis, src=src, dst=dst, grad_dtype=torch.bfloat16)
        redistribute(x.detach(), axis, src=src, dst=dst)
        with torch.no_grad():
            redistribute(x, axis, src=src, dst=dst)


# --- cost -------------------------------------------------------------------------------------


class _Ops(TorchDispatchMode):
    """The operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("src", "dst", "shape", "ops"),
    [
        (P, R, None, ["_c10d_functional.all_reduce.default"]),
        (S(0), R, None, ["_c10d_functional.all_gather_into_tensor.default"]),
        (P, S(0), None, ["_c10d_functional.reduce_scatter_tensor.default"]),
        (R, S(0), None, ["aten.slice.Tensor", "aten.clone.default"]),
        (I, R, None, []),
        (S(0), R, ShardShape.even(8, 2), ["_c10d_functional.all_gather_into_tensor.default"]),
        (P, S(0), ShardShape.even(8, 2), ["_c10d_functional.reduce_scatter_tensor.default"]),
    ],
    ids=str,
)
def test_nothing_is_added_where_nothing_is_padded(
    src: Kind, dst: Kind, shape: ShardShape | None, ops: list[str]
) -> None:
    with fake_world(2):
        axis = MoEMesh.init("cpu", tp=2)[TP]
        rows = 4 if isinstance(src, Shard) else 8
        x = torch.ones(rows, 3)
        with torch.no_grad(), _Ops() as log:
            redistribute(x, axis, src=src, dst=dst, shape=shape)
        free = {"aten.view.default", "_c10d_functional._wrap_tensor_autograd.default"}
        assert [op for op in log.seen if op not in free] == ops


def test_planning_is_cached() -> None:
    plan.cache_clear()
    with fake_world(2):
        axis = MoEMesh.init("cpu", tp=2)[TP]
        for _ in range(3):
            redistribute(torch.ones(5, 3), axis, src=R, dst=S(0), shape=ShardShape.even(5, 2))
    assert (plan.cache_info().misses, plan.cache_info().hits) == (1, 2)


def test_every_pair_of_kinds_has_a_row_or_is_refused() -> None:
    with fake_world(2):
        axis = MoEMesh.init("cpu", tp=2)[TP]
        for src, dst in product((*KINDS, V), repeat=2):
            letters = tuple("S" if isinstance(k, Shard) else k.value for k in (src, dst))
            if src == dst or letters in MOVES:
                redistribute(torch.ones(2, 2), axis, src=src, dst=dst)
                continue
            with pytest.raises(
                PlacementError,
                match=re.escape(f"no move {src!r} -> {dst!r}"),
            ):
                redistribute(torch.ones(2, 2), axis, src=src, dst=dst)
    assert len(moves_table().splitlines()) == 2 + len(MOVES)


def test_a_missing_shape_is_asked_for() -> None:
    with fake_world(4):
        axis = MoEMesh.init("cpu", tp=4)[TP]
        with pytest.raises(ShapeError, match=r"shape=ShardShape.even\(5, 4\)"):
            redistribute(torch.ones(5), axis, src=R, dst=S(0))
