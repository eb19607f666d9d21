"""The moves on real gloo processes, of a spread of sizes, and on one rank alone.

`test_redistribute.py` simulates every size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TypeAlias, cast

import pytest
import spmd_types
import torch
import torch.distributed as dist
from spmd_types import Shard
from torch import Tensor

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
from tests.bench.moves import rank_main, world_of_one
from tests.support import moves_oracle as oracle
from tests.support.workers import run

KINDS: tuple[Kind, ...] = (R, I, P, S(0), S(1))
PAIRS = [(src, dst) for src in KINDS for dst in KINDS]
# spmd_types 0.3.1 calls the names that torch 2.12 renamed.
OLD_NAMES = "ignore:.*_tensor.* is deprecated:FutureWarning"

ByDim: TypeAlias = tuple[ShardShape, ShardShape]


def dim(kind: Kind) -> int:
    return kind.dim if isinstance(kind, Shard) else 0


def shape_for(src: Kind, dst: Kind, by_dim: ByDim) -> ShardShape | ByDim | None:
    """The `shape` argument of a move."""
    sides = [by_dim[k.dim] for k in (src, dst) if isinstance(k, Shard)]
    if src != dst and len(sides) == 2:
        return sides[0], sides[1]
    return sides[0] if sides else None


def spread(ranks: int) -> list[ByDim]:
    totals = (0, 1, ranks - 1, ranks, ranks + 1)
    ragged = ShardShape.ragged([0, 3, 1, 0][:ranks])
    rows = [*(ShardShape.even(total, ranks) for total in totals), ragged]
    return [(r, ShardShape.even(width, ranks)) for r in rows for width in (3, 0)]


def value_and_gradient(ranks: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's result and gradient of every pair at every size, in order."""
    axis, rank, found = MoEMesh.init("cpu", tp=ranks)[TP], dist.get_rank(), []
    for (src, dst), by_dim in product(PAIRS, spread(ranks)):
        whole, cotangent = whole_and_cotangent(by_dim)
        x = oracle.scattered(whole, src, by_dim[dim(src)], ranks)[rank].requires_grad_()
        g = oracle.scattered(cotangent, dst.backward_type(), by_dim[dim(dst)], ranks)[rank]
        y = redistribute(x, axis, src=src, dst=dst, shape=shape_for(src, dst, by_dim))
        y.backward(g.t().contiguous().t())  # gradients need not be contiguous
        assert type(x.grad) is Tensor and x.grad.shape == x.shape
        found.append((y.detach() + 0, x.grad))
    return found


def whole_and_cotangent(by_dim: ByDim) -> tuple[Tensor, Tensor]:
    size = [shape.total for shape in by_dim]
    return oracle.integers(*size, seed=size[0]), oracle.integers(*size, seed=size[0] + 9)


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_ranks(ranks: int) -> None:
    """The whole is kept, and <A g, dx> equals <g, A dx>; all exact, the numbers being whole."""
    results, alive = list(zip(*run(ranks, value_and_gradient, ranks), strict=True)), 0
    cases = list(product(PAIRS, spread(ranks)))
    for ((src, dst), by_dim), by_rank in zip(cases, results, strict=True):
        (ys, dxs), (whole, cotangent) = zip(*by_rank, strict=True), whole_and_cotangent(by_dim)
        assert torch.equal(oracle.meaning(ys, dst), whole), (src, dst, by_dim)
        gradients = oracle.scattered(cotangent, dst.backward_type(), by_dim[dim(dst)], ranks)
        there = oracle.product(ys, gradients, dst)
        values = oracle.scattered(whole, src, by_dim[dim(src)], ranks)
        assert there == oracle.product(values, dxs, src), (src, dst, by_dim)
        alive += there != 0
    assert alive > len(cases) / 4, "nearly all products were zero: nothing was compared"


def equal_to_spmd_types(ranks: int) -> list[str]:
    """The pairs whose result or gradient differs in any bit from spmd_types' on equal sizes."""
    axis, rank, differ = MoEMesh.init("cpu", tp=ranks)[TP], dist.get_rank(), []
    by_dim = (ShardShape.even(2 * ranks, ranks), ShardShape.even(ranks, ranks))
    whole = torch.randn(2 * ranks, ranks, generator=torch.Generator().manual_seed(0))
    for src, dst in PAIRS:
        results = []
        for function, where in ((redistribute, axis), (spmd_types.redistribute, axis.group)):
            move = cast(Callable[..., Tensor], function)
            x = oracle.scattered(whole, src, by_dim[dim(src)], ranks)[rank].requires_grad_()
            y = move(x, where, src=src, dst=dst)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y) * (rank + 1))
            results.append((y.detach() + 0, dx + 0))
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            differ.append(f"{src} -> {dst}")
    return differ


@pytest.mark.gloo
@pytest.mark.filterwarnings(OLD_NAMES)
def test_real_ranks_equal_spmd_types_to_the_bit() -> None:
    assert run(2, equal_to_spmd_types, 2) == [[], []]


def second_gradients(ranks: int) -> list[str]:
    """The pairs for which the gradient of the gradient is not the move itself."""
    axis, rank, wrong = MoEMesh.init("cpu", tp=ranks)[TP], dist.get_rank(), []
    by_dim = (ShardShape.even(5, ranks), ShardShape.even(3, ranks))
    for src, dst in PAIRS:
        whole, other = whole_and_cotangent(by_dim)
        x = oracle.scattered(whole, src, by_dim[dim(src)], ranks)[rank].requires_grad_()
        g = oracle.scattered(other, dst, by_dim[dim(dst)], ranks)[rank].requires_grad_()
        y = redistribute(x, axis, src=src, dst=dst, shape=shape_for(src, dst, by_dim))
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        (dg,) = torch.autograd.grad(dx, g, x.detach())
        if not torch.equal(dg, y.detach()):
            wrong.append(f"{src} -> {dst}")
    return wrong


@pytest.mark.gloo
def test_second_order_on_real_ranks() -> None:
    assert run(4, second_gradients, 4) == [[]] * 4


@pytest.mark.gloo
def test_the_benchmark_prints_every_move() -> None:
    found = run(2, rank_main, 5, 3)[0]
    assert len(found) == len(MOVES) and all(seconds > 0 for *_, seconds, _ in found)


@pytest.mark.filterwarnings("ignore")
def test_a_call_in_a_world_of_one_costs_no_more_than_10_us_over_spmd_types() -> None:
    """Median of many, the two in turn, so a busy machine slows both."""
    for kinds, ours, theirs in world_of_one(300):
        assert ours < theirs + 10e-6, kinds


def test_one_rank_is_told_as_many_are() -> None:
    """The same tensor comes back, but only where the call would be right on more ranks too."""
    axis, x, nowhere = MoEMesh.single()[TP], torch.ones(5, 3), S(2)
    for kind in KINDS:
        assert redistribute(x, axis, src=kind, dst=kind) is x
    assert redistribute(x, axis, src=I, dst=R) is x
    with pytest.raises(ShapeError, match="names dim 2"):
        redistribute(x, axis, src=nowhere, dst=nowhere)
    with pytest.raises(ShapeError, match="names dim 2"):
        redistribute(x, axis, src=R, dst=nowhere)
    with pytest.raises(DtypeError, match="would be summed over the ranks in bf16"):
        redistribute(x.bfloat16().requires_grad_(), axis, src=I, dst=R)
    with pytest.raises(PlacementError, match="is no kind"):
        redistribute(x, axis, src=S, dst=S)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ShapeError, match="but shape says"):
        redistribute(x, axis, src=S(0), dst=S(0), shape=ShardShape.even(4, 1))
    with pytest.raises(PlacementError, match="no move"):
        redistribute(x, axis, src=V, dst=R)
