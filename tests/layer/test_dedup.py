"""`DedupAllToAll`: rows sent, sums of rows, overlap, and when it is the default."""

# Shape letters in this file:
#   T  tokens of a rank    K  experts per token    D  model width    E  experts    N  slots
#   M  originals    R  their copies

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spmd_moe import (
    AllToAll,
    DedupAllToAll,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    ScoreApplication,
    SharedConfig,
    init_weights,
)
from spmd_moe.check.mirror_world import mirror_world
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.copy_rows import Copies, add_copies, copy
from spmd_moe.layer.dispatch.default_dispatcher import expected_ranks
from spmd_moe.layer.router import Routing, count_choices
from tests.support.operator_log import Operator, operators

# --- rows sent --------------------------------------------------------------------------------

E, K, T, D = 128, 8, 64, 3


def chosen(rank: int) -> Tensor:
    """K different experts of each token, all equally likely."""
    draw = torch.Generator().manual_seed(rank)
    return torch.rand((T, E), generator=draw).topk(K, 1).indices


def rows_sent(ran: list[Operator]) -> list[int]:
    moved = (o for o in ran if "all_to_all_single" in o.name and o.dtype is torch.float64)
    return [o.shape[0] for o in moved]


def on_the_wire(ep: int) -> list[int]:
    """Rows that this rank sends: there, back, and in backward."""
    mesh, ids = MoEMesh.init("cpu", dp=ep, ep=ep), chosen(dist.get_rank())
    none = torch.zeros((), dtype=torch.int64)
    counts_E = count_choices(ids, E)
    weights = torch.ones(T, K)
    routing = Routing(ids, weights, weights, weights, counts_E, none, none, complete=True)
    x = torch.ones(T, D, dtype=torch.float64, requires_grad=True)
    dispatcher = DedupAllToAll(mesh, E)
    with operators() as ran:
        arrived, state = dispatcher.dispatch(x, weights, routing)
        dispatcher.collect(arrived.rows_RD, state).sum().backward()
    return rows_sent(ran)


@pytest.mark.parametrize("ep", [2, 4, 8])
def test_a_token_crosses_once_for_each_rank(ep: int) -> None:
    """0.25, 0.45 and 0.67 of the rows of a plain exchange, T*K of each rank, are expected."""
    pairs = [[0] * ep for _ in range(ep)]  # tokens from one rank with a choice on another
    for rank in range(ep):
        for token in chosen(rank).tolist():
            for owner in {e * ep // E for e in token}:
                pairs[rank][owner] += 1
    sent = [sum(row) for row in pairs]
    received = [sum(row[rank] for row in pairs) for rank in range(ep)]
    wanted = [[there, back, there, back] for there, back in zip(sent, received, strict=True)]
    assert threaded(ep, on_the_wire, ep) == wanted
    share = expected_ranks(E, K, ep) / K
    assert round(share, 2) == {2: 0.25, 4: 0.45, 8: 0.67}[ep]
    assert abs(sum(sent) / (ep * T * K) / share - 1) < 0.02


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks"), [(6, 3, 2), (6, 2, 3), (8, 4, 4), (4, 4, 1)]
)
def test_expected_ranks_is_the_mean_over_all_choices(experts: int, top_k: int, ranks: int) -> None:
    share = experts // ranks
    reached = [len({e // share for e in some}) for some in combinations(range(experts), top_k)]
    assert expected_ranks(experts, top_k, ranks) == pytest.approx(sum(reached) / len(reached))


def test_the_table_of_the_docs_is_right() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "layer.md").read_text()
    rows = re.findall(r"^\| (\d+) experts, (\d+) for each token \|([^\n]*)\|$", text, re.M)
    assert len(rows) == 2
    for experts, top_k, shares in rows:
        numbers = [share.strip() for share in shares.split("|") if share.strip()]
        for power, share in enumerate(numbers):
            sent = expected_ranks(int(experts), int(top_k), 2**power) / int(top_k)
            assert f"{sent:.2f}" == share


@pytest.mark.parametrize(
    ("degrees", "experts", "top_k", "kind"),
    [
        ({"dp": 2, "ep": 2}, 128, 8, DedupAllToAll),
        ({"dp": 8, "ep": 8}, 128, 8, DedupAllToAll),
        ({"dp": 16, "ep": 16}, 128, 8, AllToAll),  # 0.82
        ({"dp": 4, "ep": 4}, 8, 2, AllToAll),
        ({"dp": 4, "ep": 4}, 8, 1, AllToAll),
        ({"tp": 2, "etp": 2}, 8, 2, DedupAllToAll),  # each token once, not K times
    ],
)
def test_it_is_the_default_where_it_sends_less(
    degrees: dict[str, int], experts: int, top_k: int, kind: type
) -> None:
    world = degrees.get("dp", 1) * degrees.get("tp", 1)
    with mirror_world(world):
        mesh = MoEMesh.init("cpu", **degrees)
        layer = MoE(MoEConfig(8, 16, RouterConfig(experts, top_k)), mesh)
    assert type(layer.dispatcher) is kind


# --- values -----------------------------------------------------------------------------------

LAYOUTS = [
    {"dp": 4, "ep": 4},
    {"dp": 2, "tp": 2, "ep": 2, "etp": 2},
    {"tp": 4, "ep": 2},
    {"dp": 2, "tp": 2, "etp": 4},
]
CONFIG = MoEConfig(8, 16, RouterConfig(16, 6, dtype=torch.float64), src=I, dst=I)


def step(kind: type[AllToAll] | type[DedupAllToAll], degrees: dict[str, int], late: bool) -> Tensor:
    """The output of a layer and all its gradients, in one tensor."""
    mesh = MoEMesh.init("cpu", **degrees)
    how = ScoreApplication.IN_COMBINE if late else CONFIG.score_application
    config = replace(CONFIG, score_application=how, bias=late)
    layer = MoE(config, mesh, kind(mesh, 16))
    init_weights(layer, mesh, seed=0, std=0.5)
    layer.to(torch.float64)
    draw = torch.Generator().manual_seed(dist.get_rank() // degrees.get("tp", 1))
    x = torch.randn(9, 8, generator=draw, dtype=torch.float64).requires_grad_()
    y = layer(x, torch.arange(9) % 4 > 0 if late else None).hidden
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(y.sin().sum(), leaves)
    return torch.cat([t.detach().flatten() for t in (y, *grads)])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_values_and_gradients_are_those_of_all_to_all(degrees: dict[str, int], late: bool) -> None:
    want, got = (threaded(4, step, kind, degrees, late) for kind in (AllToAll, DedupAllToAll))
    again = threaded(4, step, DedupAllToAll, degrees, late)
    for a, b, c in zip(want, got, again, strict=True):
        assert a.any() and torch.equal(b, c)
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


# --- sums of rows -----------------------------------------------------------------------------


def made_copies() -> Copies:
    """Rows of 4 originals: 3, none, 1 and 2 of them."""
    original_R = torch.tensor([3, 0, 0, 2, 3, 0])
    sizes_M = original_R.bincount(minlength=4)
    return Copies(original_R, original_R.argsort(stable=True), sizes_M.cumsum(0) - sizes_M)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_copies_are_added_in_order_and_in_float32(dtype: torch.dtype) -> None:
    """256 and 1 are 257 in float32, and 256 in bfloat16; then -256 leaves 1 or 0."""
    copies = made_copies()
    x = torch.tensor([[1.0], [256.0], [1.0], [5.0], [2.0], [-256.0]]).to(dtype).requires_grad_()
    sums = add_copies(x.expand(6, 40), copies)
    assert sums.dtype is dtype and sums[:, 7].tolist() == [1.0, 0.0, 5.0, 3.0]
    x_MD = torch.zeros(4, 40, dtype=dtype, requires_grad=True)
    copy(x_MD, copies).backward(x.detach().expand(6, 40))
    assert x_MD.grad is not None and torch.equal(x_MD.grad, sums.detach())


def test_sums_and_copies_have_derivatives_of_any_order() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x_MD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    copies = made_copies()
    assert torch.autograd.gradgradcheck(lambda x: add_copies(x, copies).sin(), x)
    assert torch.autograd.gradgradcheck(lambda x: copy(x, copies).sin(), x_MD)


# --- overlap ----------------------------------------------------------------------------------


def order_of_events() -> list[str]:
    """Sends, the first use of each result, sorts and matmuls, in the order in which they run."""
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    config = MoEConfig(16, 32, RouterConfig(8, 6), shared=SharedConfig(32))
    layer = MoE(config, mesh, DedupAllToAll(mesh, 8)).eval()
    init_weights(layer, mesh, seed=0)
    with operators() as ran, torch.no_grad():
        layer(torch.ones(5, 16))
    words = {"all_to_all_single": "send", "sort": "sort", "embedding_bag": "add", "::mm": "matmul"}
    kinds = {None: "", torch.int64: "numbers", torch.int32: "ids", torch.float32: "rows"}
    events = list[str]()
    for o in ran:
        if kinds[o.waits] not in ("", events[-1] if events else ""):
            events.append(kinds[o.waits])
        events += [word for name, word in words.items() if name in o.name]
    return events


def test_what_can_run_runs_while_rows_travel() -> None:
    """A result is waited for where it is first used."""
    route = ["matmul"]
    numbers = ["send", "sort", "numbers"]  # slots are sorted while numbers travel
    # Ids travel while rows are made; arrived ids are sorted while rows and weights travel.
    there, experts = ["send", "sort", "send", "send", "ids", "sort", "rows", "numbers"], ["add"]
    back = ["send", "matmul", "matmul", "matmul", "rows", "add"]  # the shared expert
    assert threaded(2, order_of_events) == [route + numbers + there + experts + back] * 2
