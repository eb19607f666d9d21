"""The whole layer against one process, on every layout: outputs, counts and every gradient."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from spmd_moe.check.signatures import signatures
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import R
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import MoEConfig, SharedConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.train.init_weights import init_weights
from tests.support.dispatchers import make_dispatcher
from tests.support.layer_cases import EXPERTS, FACTORS, WIDE, WORLDS, case, choices, layouts
from tests.support.layer_layouts import Case, Layout
from tests.support.layer_runs import compare, run_rank, run_typed, wanted
from tests.support.operator_log import operators
from tests.support.workers import run

LAYOUTS = [layout for world in WORLDS for layout in layouts(world)]


def shared_axes(layout: Layout) -> tuple[bool, ...]:
    """The axes of more than one rank: all that types know of a layout."""
    return tuple(size > 1 for size in layout.sizes.values())


# The first layout of each kind. Only these are typed, except by `--long`.
TYPED = {shared_axes(layout): layout for layout in reversed(LAYOUTS)}.values()
# Those that also run on real processes.
REAL = [
    *(x for x in LAYOUTS if x.world == 2),
    Layout(cp=3, etp=3),
    *(x for x in TYPED if x.world == 4 and x.ep * x.etp == 4 and 4 not in (x.dp, x.cp, x.tp)),
    Layout(dp=3, tp=2, ep=3, etp=2),
    Layout(cp=2, tp=3, ep=2),
    Layout(dp=2, cp=2, tp=2, ep=4, etp=2),
]
CASES_EACH = {1: 8, 2: 8, 3: 6, 4: 4, 6: 2, 8: 1}


def cases(layout: Layout, more: int = 0) -> list[Case]:
    return [case(layout, choice) for choice in choices(layout, CASES_EACH[layout.world] + more)]


def run_all(layout: Layout, some: Sequence[Case], *, typed: bool) -> None:
    """Compared with the oracle; typed: under spmd_types' strict checker, signatures checked."""
    with signatures(["spmd_moe"]) if typed else nullcontext():
        for this in some:
            try:
                compare(this, threaded(layout.world, run_rank, this, typed))
            except Exception as error:
                raise AssertionError(f"{this}, typed {typed}: {error}") from error


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sharded_equals_whole(layout: Layout) -> None:
    """The first case of some layouts typed, all others plain: types cost more than the layer.

    Where it is typed on real processes below, it is plain here.
    """
    typed = int(layout in TYPED and layout.world > 1 and layout not in REAL)
    run_all(layout, cases(layout)[:typed], typed=True)
    run_all(layout, cases(layout)[typed:], typed=False)


@pytest.mark.long
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.world > 1], ids=str)
def test_all_cases_and_another_typed(layout: Layout) -> None:
    run_all(layout, cases(layout, more=1), typed=True)


def test_every_kind_of_layout_is_typed() -> None:
    kinds = {shared_axes(layout) for layout in LAYOUTS}
    assert {shared_axes(layout) for layout in TYPED} == kinds and len(kinds) == 1 + 7 * 7
    assert len(REAL) == 9 + 1 + 9 + 3 and all(layout.world <= 8 for layout in REAL)


def test_any_two_factors_meet() -> None:
    met = defaultdict(set)
    for layout in LAYOUTS:
        for choice in choices(layout, CASES_EACH[layout.world]):
            for a, b in combinations(FACTORS, 2):
                met[a, b].add((str(choice[a]), str(choice[b])))
    for a, b in combinations(FACTORS, 2):
        wanted = {(str(x), str(y)) for x, y in product(FACTORS[a], FACTORS[b])}
        assert wanted == met[a, b]


def test_the_grid_is_alive() -> None:
    """What is compared is not zero for want of tokens, and experts are both hit and starved."""
    hit: set[int] = set()
    alive: dict[str, int] = defaultdict(int)
    starved = 0
    for layout in [x for x in LAYOUTS if x.world == 4]:
        for this in cases(layout):
            whole = wanted(this)
            for name, tensor in whole.items():
                alive[name] += bool(tensor.count_nonzero())
            hit |= set(whole["counts"].nonzero().flatten().tolist())
            starved += bool((whole["counts"] == 0).any())
    assert hit >= set(range(24)) and starved > 10  # identity experts have ids above these
    assert all(count > 10 for name, count in alive.items() if name != "router.bias_E"), alive


# --- real processes ---------------------------------------------------------------------------


@pytest.mark.gloo
@pytest.mark.parametrize("layout", REAL, ids=str)
def test_on_real_processes(layout: Layout) -> None:
    first, *others = cases(layout)[:2]
    compare(first, run(layout.world, run_typed, first))
    for this in others:
        compare(this, run(layout.world, run_rank, this))


@pytest.mark.gloo
def test_repeats_are_equal_to_the_bit() -> None:
    this = next(
        case(Layout(dp=2, tp=2, ep=2, etp=2), choice)
        for choice in choices(Layout(dp=2, tp=2, ep=2, etp=2), 999)
        if choice["tokens"] == "2n+3" and choice["variant"] == "groups"
    )
    first, second = (run(4, run_rank, this) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


# --- precision ---------------------------------------------------------------------------------

# Weights that are I on tp: the router's, the shared gate's, and the other three if it is whole.
REDUCED = {"sharded": 2, "whole": 5}
# Rows back from the experts, for each axis; backward the same for rows and scores; at last the rows
# that were gathered for the caller. A sharded shared expert adds one sum forward and one backward.
SCATTERED = {"all_to_all": 1 + 2 + 1, "dedup": 1 + 2 + 1, "all_gather": 2 + 4 + 1}


def sums_over_ranks(config: MoEConfig, dispatcher: str) -> Counter[str]:
    """The sums over ranks that a step of a bf16 layer takes, with their dtypes."""
    mesh = MoEMesh.init("cpu", dp=2, tp=2, ep=2, etp=2)
    made = make_dispatcher(dispatcher, mesh, config.router.num_experts)
    layer = MoE(config, mesh, made).to(torch.bfloat16)
    init_weights(layer, mesh, seed=0)
    with operators() as ran:
        x = torch.ones(EXPERTS, config.dim, dtype=torch.bfloat16, requires_grad=True)
        layer(x).hidden.sum().backward()
    kinds = ("all_reduce", "reduce_scatter")
    return Counter(f"{k} {o.dtype}" for o in ran for k in kinds if k in o.name)


@pytest.mark.parametrize("shared", REDUCED)
@pytest.mark.parametrize("dispatcher", SCATTERED)
def test_sums_over_ranks_are_taken_in_float32(dispatcher: str, shared: str) -> None:
    """Values have eight bits; a sum over ranks that had no more would lose some of each part."""
    beside = SharedConfig(WIDE, gated=True, sharded=shared == "sharded")
    config = MoEConfig(
        6, WIDE, RouterConfig(EXPERTS, 2, force_balance=True), shared=beside, src=R, dst=R
    )
    reduced, scattered = REDUCED[shared], SCATTERED[dispatcher] + 2 * beside.sharded
    want = {"all_reduce torch.float32": reduced, "reduce_scatter torch.float32": scattered}
    assert threaded(4, sums_over_ranks, config, dispatcher) == [want] * 4


# --- the comparison itself can fail -------------------------------------------------------------


def spoiled(by_rank: list[dict[str, Tensor]], name: str) -> list[dict[str, Tensor]]:
    """The last rank that has something in it gets a wrong value."""
    copies = [{n: t.clone() for n, t in rank.items()} for rank in by_rank]
    last = max(r for r, rank in enumerate(copies) if rank[name].numel())
    copies[last][name].view(-1)[-1] += 1
    return copies


def test_a_wrong_value_anywhere_is_found() -> None:
    layout = Layout(dp=2, tp=2, ep=2, etp=2)
    choice = {name: values[0] for name, values in FACTORS.items()} | {"tokens": "2n+3"}
    this: Case = case(layout, choice)
    by_rank = threaded(layout.world, run_rank, this)
    compare(this, by_rank)
    for name in by_rank[0]:
        with pytest.raises(AssertionError):
            compare(this, spoiled(by_rank, name))
