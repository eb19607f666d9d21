"""The dispatchers against a loop over tokens, and `collect` as the inverse of `dispatch`.

Experts here are linear and all numbers are small and whole, so every sum is exact in any order:
the dispatchers must agree with the loop, and so with each other, to the bit.
"""

# Shape letters in this file (a small letter is this rank's share of the capital):
#   T  tokens    K  experts per token    D  model width    F  hidden width
#   N  slots that have an expert   E  experts   e  experts on this rank
#   R  rows at this rank's experts   S  ranks of ep

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import EDP, EP, ETP
from spmd_moe.layer.dispatch import Dispatcher
from tests.support.layer_layouts import Layout, gradient, meaning, part
from tests.support.operator_log import Operator, operators
from tests.support.routings import (
    EMPTY,
    MAKE,
    PAIRS,
    ROUTINGS,
    W1,
    W2,
    D,
    E,
    World,
    by_loop,
    made_rows,
    mesh_of,
    routing_of,
    world_of,
)

ROOT = Path(__file__).resolve().parents[2]

# --- values and gradients ---------------------------------------------------------------------


def on_rank(world: World, name: str) -> list[list[Tensor]]:
    """Weights that travel with the rows, then weights that stay with the tokens."""
    dispatcher = MAKE[name](mesh_of(world.layout), E)
    return [through(dispatcher, world, early) for early in (True, False)]


def through(dispatcher: Dispatcher[Any], world: World, early: bool) -> list[Tensor]:
    """This rank's output, and the gradients of its tokens, scores and weights."""
    rank, lay = dist.get_rank(), world.layout
    x, scores = world.x[rank].clone(), world.scores[rank].clone()
    w1, w2 = part(world.w1_EFD, W1, lay, rank), part(world.w2_EDF, W2, lay, rank)
    leaves = [leaf.requires_grad_() for leaf in (x, scores, w1, w2)]
    routing = routing_of(world.ids[rank], scores)
    arrived, state = dispatcher.dispatch(x, scores if early else None, routing)
    rows = made_rows(arrived).split(arrived.counts_e.tolist())
    y_RD = torch.cat([part_RD @ w1[e].T @ w2[e].T for e, part_RD in enumerate(rows)])
    if early:
        assert arrived.scores_R is not None
        y_RD = y_RD * arrived.scores_R.unsqueeze(1)
    else:
        assert arrived.scores_R is None
    y = dispatcher.combine(dispatcher.collect(y_RD, state), state)
    return [y.detach(), *torch.autograd.grad(y, leaves, world.g[rank])]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("layout", "name"), PAIRS, ids=str)
def test_values_and_gradients(layout: Layout, name: str, routing: str) -> None:
    world = world_of(layout, routing)
    wanted = by_loop(world)
    assert routing in EMPTY or all(want.any() for want in wanted)
    for results in zip(*threaded(layout.world, on_rank, world, name), strict=True):
        y, dx, dscores, dw1, dw2 = (list(parts) for parts in zip(*results, strict=True))
        got = [torch.cat(y), torch.cat(dx), torch.cat(dscores)]
        got += [meaning(dw1, gradient(W1), layout), meaning(dw2, gradient(W2), layout)]
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)


# --- rows that come back ----------------------------------------------------------------------


def there_and_back(world: World, name: str) -> bool:
    """Experts that give back what they get; of a sum over etp, one rank gives all."""
    mesh, ids = mesh_of(world.layout), world.ids[dist.get_rank()]
    dispatcher = MAKE[name](mesh, E)
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    came = [comes_back(dispatcher, mesh, ids, dtype) for dtype in dtypes]
    return all(came)


def comes_back(dispatcher: Dispatcher[Any], mesh: MoEMesh, ids: Tensor, dtype: torch.dtype) -> bool:
    x = torch.randn(ids.shape[0], D, generator=torch.Generator().manual_seed(1)).to(dtype)
    arrived, state = dispatcher.dispatch(x, None, routing_of(ids))
    rows = made_rows(arrived)
    back = dispatcher.collect(rows if mesh[ETP].rank == 0 else torch.zeros_like(rows), state)
    y = dispatcher.combine(back, state)
    assert back.dtype is dtype and torch.equal(y + 0, x * (ids >= 0).sum(1, keepdim=True))
    return bool(y.any())


Arrivals = list[list[tuple[float, float]]]  # for each expert here: token and weight of every row


def what_arrives(world: World, name: str) -> list[Arrivals]:
    """For each pair of precisions. Tokens carry their number."""
    dispatcher = MAKE[name](mesh_of(world.layout), E)
    ids = world.ids[dist.get_rank()]
    return [arrivals(dispatcher, ids, *dtypes) for dtypes in DTYPES]


def arrivals(
    dispatcher: Dispatcher[Any], ids: Tensor, row_dtype: torch.dtype, score_dtype: torch.dtype
) -> Arrivals:
    rank = dist.get_rank()
    x = (torch.arange(ids.shape[0]) + 50 * rank).to(row_dtype).unsqueeze(1).expand(-1, D)
    scores = numbered_scores(rank, ids).to(score_dtype)
    arrived, _ = dispatcher.dispatch(x, scores, routing_of(ids))
    rows, scores_R = made_rows(arrived), arrived.scores_R
    assert rows.dtype is row_dtype and scores_R is not None and scores_R.dtype is score_dtype
    assert torch.equal(rows[:, :1].expand(-1, D), rows + 0)
    found = list(zip(rows[:, 0].tolist(), scores_R.to(torch.float32).tolist(), strict=True))
    sizes = arrived.counts_e.tolist()
    assert arrived.counts_e.dtype is torch.int64 and sum(sizes) == len(found)
    return [sorted(found[sum(sizes[:e]) : sum(sizes[: e + 1])]) for e in range(len(sizes))]


def numbered_scores(rank: int, ids: Tensor) -> Tensor:
    """Another weight for each slot, with bits in all places of a float32."""
    return 1 / (torch.arange(1.0, ids.numel() + 1) + 100 * rank).view_as(ids)


DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize("routing", ["uneven", "some without expert", "one expert"])
@pytest.mark.parametrize(("layout", "name"), PAIRS, ids=str)
def test_every_expert_gets_its_rows_and_their_weights(
    layout: Layout, name: str, routing: str
) -> None:
    world = world_of(layout, routing)
    by_rank = threaded(layout.world, what_arrives, world, name)
    share, places = E // layout.ep, [layout.place(rank) for rank in range(layout.world)]
    for place, got in zip(places, by_rank, strict=True):
        wanted: Arrivals = [[] for _ in range(share)]
        for rank, ids in enumerate(world.ids):
            if places[rank][EDP] != place[EDP]:
                continue
            scores = numbered_scores(rank, ids)
            for t, k in product(*map(range, ids.shape)):
                e = int(ids[t, k]) - place[EP] * share
                if int(ids[t, k]) >= 0 and 0 <= e < share:
                    wanted[e].append((float(t + 50 * rank), scores[t, k].item()))
        assert got == [[sorted(rows) for rows in wanted]] * len(DTYPES)
    assert any(rows for got in by_rank for rows in got[0])


# --- what is sent -----------------------------------------------------------------------------


WAITS = re.compile("wait_tensor|_wrap_tensor")  # what follows a collective, and sends nothing


def sent(ran: list[Operator]) -> list[str]:
    """The collectives, and whether they move counts or rows."""
    found = [o for o in ran if "c10d_functional" in o.name and not WAITS.search(o.name)]
    kinds = {torch.int64: "counts", torch.int32: "ids"}
    kinds |= {torch.float64: "rows", torch.float32: "weights"}
    return [f"{o.name.split('::')[1]} of {kinds[o.dtype]}" for o in found if o.dtype is not None]


def collectives(world: World, name: str, early: bool) -> tuple[list[str], list[str], list[str]]:
    """Those of dispatch, of collect, and of backward. Weights are float32."""
    rank, dispatcher = dist.get_rank(), MAKE[name](mesh_of(world.layout), E)
    x = world.x[rank].clone().requires_grad_()
    scores = world.scores[rank].to(torch.float32).requires_grad_() if early else None
    routing = routing_of(world.ids[rank])
    with operators() as there:
        arrived, state = dispatcher.dispatch(x, scores, routing)
    weight = 1 if arrived.scores_R is None else arrived.scores_R.unsqueeze(1)
    with operators() as back:
        y = dispatcher.collect(made_rows(arrived) * weight, state)
    with operators() as backward:
        y.backward(torch.ones_like(y))
    assert x.grad is not None
    return sent(there), sent(back), sent(backward)


COUNTS, IDS, ROWS, WEIGHTS = (
    f"all_to_all_single of {what}" for what in ("counts", "ids", "rows", "weights")
)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "layout", [Layout(dp=2, ep=2), Layout(dp=4, ep=4), Layout(tp=4, ep=2)], ids=str
)
@pytest.mark.parametrize("routing", ["uneven", "one expert", "some without expert", "no tokens"])
def test_all_to_all_is_one_exchange_of_counts_and_two_of_rows(
    layout: Layout, routing: str, early: bool
) -> None:
    """And one of weights, if experts apply them; backward knows the counts already."""
    runs = threaded(layout.world, collectives, world_of(layout, routing), "all_to_all", early)
    weights = [WEIGHTS] * early
    assert runs == [([COUNTS, ROWS, *weights], [ROWS], [ROWS, *weights, ROWS])] * layout.world


@pytest.mark.parametrize("routing", ["uneven", "some without expert", "no tokens"])
def test_dedup_also_sends_ids(routing: str) -> None:
    layout = Layout(dp=4, ep=4)
    runs = threaded(layout.world, collectives, world_of(layout, routing), "dedup", True)
    there, backward = [COUNTS, IDS, ROWS, WEIGHTS], [ROWS, WEIGHTS, ROWS]
    assert runs == [(there, [ROWS], backward)] * layout.world


@pytest.mark.parametrize("name", ["all_to_all", "dedup"])
def test_an_exchange_of_one_rank_sends_nothing(name: str) -> None:
    layout = Layout(dp=2)
    runs = threaded(layout.world, collectives, world_of(layout, "uneven"), name, True)
    assert runs == [([], [], [])] * 2


def test_all_gather_sends_the_same_whatever_the_routing() -> None:
    layout = Layout(dp=4, ep=4)
    runs = [
        threaded(layout.world, collectives, world_of(layout, routing), "all_gather", False)
        for routing in ("uneven", "one expert")
    ]
    gather, scatter = "all_gather_into_tensor", "reduce_scatter_tensor"
    # How many tokens each rank has, their choices, the tokens, and their weights.
    there = [f"{gather} of {what}" for what in ("counts", "counts", "rows", "weights")]
    back, backward = [f"{scatter} of rows"], [f"{gather} of rows", f"{scatter} of rows"]
    assert runs == [[(there, back, backward)] * 4] * 2


# --- states are typed -------------------------------------------------------------------------

SNIPPET = """
from torch import Tensor
from spmd_moe.layer.dispatch import AllGather, AllToAll, DedupAllToAll, Local
from spmd_moe.layer.router import Routing

def mixed(
    x: Tensor, routing: Routing, a: Local, b: AllToAll, c: AllGather, d: DedupAllToAll
) -> None:
"""


def test_mypy_refuses_the_state_of_another_dispatcher(tmp_path: Path) -> None:
    """Of all pairs, exactly those of one with another are refused."""
    lines, wrong = SNIPPET.lstrip().splitlines(), set()
    for giver in "abcd":
        lines.append(f"    rows_{giver}, state_{giver} = {giver}.dispatch(x, None, routing)")
    for giver, taker in product("abcd", repeat=2):
        lines.append(f"    {taker}.collect(rows_{giver}.rows_RD, state_{giver})")
        if giver != taker:
            wrong.add(len(lines))
    (tmp_path / "snippet.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "mypy.ini").write_text(  # torch is not read, which would take a minute
        f"[mypy]\nmypy_path={ROOT}\nfollow_imports=silent\n"
        "[mypy-torch.*,spmd_types.*]\nfollow_imports=skip\n"
    )
    words = ["--config-file", "mypy.ini", "--no-error-summary", "snippet.py"]
    command = [sys.executable, "-m", "mypy", *words]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in ran.stdout.splitlines() if ": error: " in line]
    assert all(line.endswith("[arg-type]") for line in errors), ran.stdout + ran.stderr
    assert [int(line.split(":")[1]) for line in errors] == sorted(wrong), ran.stdout + ran.stderr
