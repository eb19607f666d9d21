"""Made-up routings, what a dispatcher needs to run one on a layout, and what must come of it."""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    E  experts    F  hidden width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import EP, ExpertInWeight, ExpertOutWeight, Placement, placement_of
from spmd_moe.layer.dispatch import Arrived
from spmd_moe.layer.router import Routing, count_choices
from tests.support.dispatchers import DISPATCHERS
from tests.support.layer_layouts import Layout

E, D, F = 4, 3, 2


def declared(annotation: object) -> Placement:
    found = placement_of(annotation)
    assert found is not None
    return found


W1, W2 = declared(ExpertInWeight), declared(ExpertOutWeight)

MAKE = {name: make for name, make in DISPATCHERS.items() if name != "fixed"}  # exact sizes
LAYOUTS = [
    Layout(),
    Layout(dp=2),
    Layout(dp=2, ep=2),
    Layout(tp=2, etp=2),
    Layout(dp=4),
    Layout(dp=4, ep=4),
    Layout(dp=2, tp=2, ep=2),
    Layout(dp=2, tp=2, ep=2, etp=2),
]
PAIRS = [(lay, n) for lay in LAYOUTS for n in MAKE if n != "local" or lay.ep * lay.etp == 1]


# --- made-up routings: the choices of the tokens of each rank ---------------------------------


def drawn(seed: int, fewest: int, *shape: int) -> Tensor:
    return torch.randint(fewest, E, shape, generator=torch.Generator().manual_seed(seed))


def to_the_next(layout: Layout, rank: int) -> Tensor:
    """All tokens to the experts of the next rank of ep, in turn."""
    share = E // layout.ep
    first = (layout.place(rank)[EP] + 1) % layout.ep * share
    return first + (torch.arange(2 * (rank + 1)) % share).view(-1, 2)


ROUTINGS: dict[str, Callable[[Layout, int], Tensor]] = {
    "uneven": lambda _, rank: drawn(rank, 0, (4, 3, 6, 2)[rank], 2),
    "one expert": lambda _, rank: torch.full((2 + rank, 1), 2),
    "next rank": to_the_next,
    "some ranks without tokens": lambda _, rank: drawn(rank, 0, (5, 0, 0, 3)[rank], 2),
    "all tokens on the last rank": lambda lay, rank: drawn(rank, 0, 6 * (rank + 1 == lay.world), 3),
    "some without expert": lambda _, rank: drawn(rank, -1, 4 + rank, 2),
    "one rank without experts": lambda _, rank: drawn(rank, 0, 3, 2).where(tensor(rank != 1), -1),
    "no experts": lambda *_: torch.full((3, 2), -1),
    "no tokens": lambda *_: torch.zeros(0, 2, dtype=torch.int64),
}
EMPTY = {"no experts", "no tokens"}  # where results are rightly zero


def tensor(value: object) -> Tensor:
    return torch.tensor(value)


@dataclass(frozen=True)
class World:
    """All that a run needs, of all ranks; each takes its own."""

    layout: Layout
    ids: list[Tensor]
    x: list[Tensor]
    scores: list[Tensor]
    g: list[Tensor]
    w1_EFD: Tensor
    w2_EDF: Tensor


def world_of(layout: Layout, routing: str) -> World:
    draw = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(1, 5, shape, generator=draw).to(torch.float64)

    ids = [ROUTINGS[routing](layout, rank) for rank in range(layout.world)]
    x, g = ([whole(i.shape[0], D) for i in ids] for _ in range(2))
    return World(layout, ids, x, [whole(*i.shape) for i in ids], g, whole(E, F, D), whole(E, D, F))


def mesh_of(lay: Layout) -> MoEMesh:
    return MoEMesh.init("cpu", dp=lay.dp, cp=lay.cp, tp=lay.tp, ep=lay.ep, etp=lay.etp)


def routing_of(ids_TK: Tensor, scores_TK: Tensor | None = None) -> Routing:
    """Without scores, every weight is 1."""
    complete, nothing = bool((ids_TK >= 0).all()), torch.zeros(())
    fine = torch.zeros((), dtype=torch.int64)
    return Routing(
        expert_ids_TK=ids_TK,
        scores_TK=torch.ones(ids_TK.shape) if scores_TK is None else scores_TK,
        logits_TE=nothing,
        probs_TE=nothing,
        counts_E=count_choices(ids_TK, E),
        dropped=fine,
        fault=fine,
        complete=complete,
    )


def made_rows(arrived: Arrived) -> Tensor:
    if arrived.gather is None:
        return arrived.rows_RD
    return arrived.rows_RD.index_select(0, arrived.gather.token_R)


def by_loop(world: World) -> list[Tensor]:
    """The output of all tokens, and the gradients of tokens, scores and weights.

    One token, one choice at a time.
    """
    x, scores, g = torch.cat(world.x), torch.cat(world.scores), torch.cat(world.g)
    leaves = [t.clone().requires_grad_() for t in (x, scores, world.w1_EFD, world.w2_EDF)]
    x, scores, w1, w2 = leaves
    y = x * 0 + 0 * (scores.sum() + w1.sum() + w2.sum())
    rows = list(y)
    for t, ids in enumerate(torch.cat(world.ids).tolist()):
        for k, e in enumerate(ids):
            if e >= 0:
                rows[t] = rows[t] + scores[t, k] * (w2[e] @ (w1[e] @ x[t]))
    y = torch.stack(rows) if rows else y
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]
