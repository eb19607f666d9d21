"""A fourth dispatcher, as a user would write it: from the protocol and public names alone."""

# Shape letters in this file (a small letter is this rank's share of the capital):
#   T  tokens    K  experts per token    D  model width    N  slots that have an expert
#   R  rows at this rank's experts    E  experts, and a mark behind them    S  ranks of ep

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spmd_moe import (
    EP,
    Dispatcher,
    MoE,
    MoEConfig,
    MoEMesh,
    R,
    RouterConfig,
    Routing,
    RoutingError,
    S,
    exchange,
    init_weights,
    redistribute,
)
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.combine import combine
from spmd_moe.layer.dispatch import Arrived
from spmd_moe.layer.dispatch.forecast import Batch
from spmd_moe.layer.permute import Slots, sort_by_expert, spread, take_scores
from spmd_moe.layer.routing_faults import check_marks
from tests.support.dispatchers import DISPATCHERS
from tests.support.layer_layouts import Case, Layout
from tests.support.layer_runs import compare, run_rank, wanted
from tests.support.routings import LAYOUTS, E


@final
@dataclass(frozen=True, slots=True)
class Padding:
    """Where rows stand in buffers that have the same room for every pair of ranks."""

    slots: Slots
    late_TK: Tensor | None  # the weights that the experts do not apply
    room: int
    sent_N: Tensor
    got_R: Tensor  # expert-major


@final
class Padded:
    """Exchanges of equal size: as much for every rank as the fullest pair of them needs."""

    fixed_shapes = False

    def __init__(self, mesh: MoEMesh, num_experts: int) -> None:
        self.ep, self.share = mesh[EP], num_experts // mesh[EP].size
        self.num_experts, self.axes = num_experts, [self.ep]

    def dispatch(
        self, x_TD: Tensor, scores_TK: Tensor | None, routing: Routing
    ) -> tuple[Arrived, Padding]:
        slots = sort_by_expert(routing.expert_ids_TK, routing.complete)
        ranks, me = self.ep.size, self.ep.rank
        told = torch.cat([routing.counts_E, routing.fault.view(1)]).unsqueeze(0)
        told_SE = redistribute(told, self.ep, src=S(0), dst=R)
        check_marks(told_SE[:, -1].tolist(), [self.ep], ranks * self.share)
        counts = told_SE[:, :-1].reshape(ranks, ranks, self.share)  # from rank, to rank, expert
        pairs, table = counts.sum(2).tolist(), counts[:, me].tolist()
        room = max(map(max, pairs))
        arrived = [e for row in table for e, n in enumerate(row) for _ in range(n)]
        got = [s * room + i for s in range(ranks) for i in range(pairs[s][me])]
        order = sorted(range(len(arrived)), key=lambda r: arrived[r])
        sent_N = [r * room + i for r in range(ranks) for i in range(pairs[me][r])]
        at = (torch.tensor(rows).long() for rows in (sent_N, [got[r] for r in order]))
        late_TK = routing.scores_TK if scores_TK is None else None
        state = Padding(slots, late_TK, room, *at)
        rows_RD = self._send(spread(x_TD, slots), state.sent_N, state.got_R, room)
        scores_R = None
        if scores_TK is not None:
            scores_N1 = take_scores(scores_TK, slots).unsqueeze(1)
            scores_R = self._send(scores_N1, state.sent_N, state.got_R, room).squeeze(1)
        return Arrived(rows_RD, scores_R, counts[:, me].sum(0)), state

    def collect(self, y_RD: Tensor, state: Padding) -> Tensor:
        return self._send(y_RD, state.got_R, state.sent_N, state.room)

    def combine(self, rows_ND: Tensor, state: Padding) -> Tensor:
        return combine(rows_ND, state.slots, state.late_TK)

    def forecast(self, batch: Batch) -> None:
        """Not known: `spmd-moe plan` says so."""

    def _send(self, rows: Tensor, at: Tensor, then: Tensor, room: int) -> Tensor:
        equal = [room] * self.ep.size
        buffer = rows.new_zeros(room * self.ep.size, rows.shape[1]).index_copy(0, at, rows)
        return exchange(buffer, self.ep.group, receives=equal, sends=equal).index_select(0, then)


@pytest.mark.parametrize("layout", [lay for lay in LAYOUTS if lay.etp == 1], ids=str)
def test_a_dispatcher_from_outside_the_package(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer takes it as it takes its own, and computes the same: what the oracle computes."""
    used: list[int] = []

    def make(mesh: MoEMesh, num_experts: int) -> Dispatcher[Padding]:
        used.append(mesh[EP].rank)
        return Padded(mesh, num_experts)

    monkeypatch.setitem(DISPATCHERS, "padded", make)
    config = MoEConfig(dim=6, hidden_dim=8, router=RouterConfig(E, 2, dtype=torch.float64))
    tokens = (5, 3, 0, 4)[: layout.world]
    results = {}
    for name in ("padded", ""):
        case = Case(layout, config, tokens, dispatcher=name)
        results[name] = threaded(layout.world, run_rank, case)
        compare(case, results[name])
        whole = wanted(case)
        assert all(whole[n].any() for n in ("out", "router.weight_ED", "experts.w2_eDF"))
    assert len(used) == layout.world
    for ours, theirs in zip(results[""], results["padded"], strict=True):
        for what in ours:
            torch.testing.assert_close(ours[what], theirs[what], rtol=1e-12, atol=1e-12)


def met_nan_on_rank_two() -> str:
    """What a rank is told, and then that the layer still works."""
    mesh = MoEMesh.init("cpu", dp=4, ep=4)
    layer = MoE(MoEConfig(dim=6, hidden_dim=8, router=RouterConfig(E, 2)), mesh, Padded(mesh, E))
    init_weights(layer, mesh, seed=0)
    x = torch.ones(3, 6)
    with pytest.raises(RoutingError) as raised:
        layer(x * (torch.nan if dist.get_rank() == 2 else 1))
    assert int(layer(x).counts_E.sum()) == 6
    return str(raised.value).splitlines()[0]


def test_scores_that_are_nan_are_told_on_all_ranks() -> None:
    told = "Router: scores are NaN or infinite on 1 of 4 ranks (ep 2)."
    assert threaded(4, met_nan_on_rank_two) == [told] * 4
