"""Targets for the tests of the checker: one small module, and what can be wrong with a target."""

# Shape letters in this file:
#   T  tokens    D  model width

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import spmd_types
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd_moe.check import Case
from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.declare_placements import declare_placements
from spmd_moe.core.host_values import read_ints
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DP, TP, P, Placed, R, S, V
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape

Whole = Placed[Tensor, DP[V], CP[V], TP[R]]
Step = Callable[["Module", Tensor], Tensor]


class Module(nn.Module):
    """Runs a function of itself and its input; the tests differ in that function alone."""

    weight: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, mesh: MoEMesh, run: Step) -> None:
        super().__init__()
        self.mesh, self.tp, self.run = mesh, mesh[TP], run
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x_TD: Whole) -> Tensor:
        return self.run(self, F.linear(x_TD, self.weight))


def of(run: Step) -> Callable[[MoEMesh, int], Case]:
    """The target whose module runs `run`."""

    def target(mesh: MoEMesh, tokens: int) -> Case:
        return Case(Module(mesh, run), (torch.randn(tokens, 4),), (Whole,))

    return target


def shared_out(m: Module, x: Tensor) -> Tensor:
    """What is right: rows are shared out, and come back."""
    shape = ShardShape.even(x.shape[0], m.tp.size)
    own = redistribute(x, m.tp, src=R, dst=S(0), shape=shape)
    return redistribute(F.silu(own), m.tp, src=S(0), dst=R, shape=shape)


def summed(m: Module, x: Tensor) -> Tensor:
    """Right, too: what ranks compute of their own rows is declared to be a part of a sum."""
    shape = ShardShape.even(x.shape[0], m.tp.size)
    own = redistribute(x, m.tp, src=R, dst=S(0), shape=shape)
    return redistribute(declare_sum(own.sum(0), m.tp), m.tp, src=P, dst=R)


good, good_sum = of(shared_out), of(summed)


# --- rules ------------------------------------------------------------------------------------


def chunked(m: Module, x: Tensor) -> Tensor:
    parts = F.pad(x, [0, 0, 0, -x.shape[0] % m.tp.size]).chunk(m.tp.size)
    return parts[m.tp.rank] * 2 if x.shape[0] else x


def ranged(m: Module, x: Tensor) -> Tensor:
    place = torch.arange(x.shape[0])
    mine = (place >= m.tp.rank) & (place < m.tp.rank + 2)
    return x * mine.unsqueeze(1)


def numbered(m: Module, x: Tensor) -> Tensor:
    """Selects the tokens of an expert by a number of this rank."""
    ids = x.detach().argmax(1)  # spmd: allow detach - ids have no gradient
    (token,) = (ids == m.tp.rank).nonzero(as_tuple=True)
    return redistribute(declare_sum(x[token].sum(0), m.tp), m.tp, src=P, dst=R)


def own_numbers(m: Module, x: Tensor) -> Tensor:
    """Right: the numbers of the experts are sharded too."""
    ids = x.detach().argmax(1)  # spmd: allow detach - ids have no gradient
    own = redistribute(torch.arange(m.tp.size), m.tp, src=R, dst=S(0))
    (token,) = (ids == own[0]).nonzero(as_tuple=True)
    return redistribute(declare_sum(x[token].sum(0), m.tp), m.tp, src=P, dst=R)


def own_rows(m: Module, x: Tensor) -> Tensor:
    shape = ShardShape.even(x.shape[0], m.tp.size)
    return redistribute(x, m.tp, src=R, dst=S(0), shape=shape)


def factory_of_a_rank(m: Module, x: Tensor) -> Tensor:
    return x * torch.ones(m.tp.rank + 1).sum()


def number_of_a_rank(m: Module, x: Tensor) -> Tensor:
    return torch.where(torch.tensor(m.tp.rank == 0), x, 0 * x)


def one_rank_alone(m: Module, x: Tensor) -> Tensor:
    return x if m.tp.rank == 0 else x * 2


def as_often_as_the_rank(m: Module, x: Tensor) -> Tensor:
    own = declare_sum(own_rows(m, x).sum(0), m.tp)
    for _ in range(m.tp.rank):
        own = own + own
    return redistribute(own, m.tp, src=P, dst=R)


def scaled_by_an_item(m: Module, x: Tensor) -> Tensor:
    y: Tensor = x * own_rows(m, x).abs().sum().item()
    return y


def factory_of_an_item(m: Module, x: Tensor) -> Tensor:
    n = int((own_rows(m, x) > -99).sum().item())
    return x * torch.ones(n + 1).sum()


def cut_by_an_item(m: Module, x: Tensor) -> Tensor:
    (n,) = read_ints((own_rows(m, x) > -99).sum().reshape(1))
    return x[: n % 3 + 1].sum(0) + x


def branch_on_an_item(m: Module, x: Tensor) -> Tensor:
    half = x.sum().item() / 2  # of two ranks, one has more than that
    return x * 2 if own_rows(m, x).sum().item() > half else x * 3


def room_for_own_rows(m: Module, x: Tensor) -> Tensor:
    """Right: rows of this rank's number are the rank's own, and reduced as such."""
    own = own_rows(m, x)
    room = torch.arange(own.shape[0]).unsqueeze(1) * 0.5 + torch.zeros(own.shape[0], 4)
    return redistribute(declare_sum((own * room).sum(0), m.tp), m.tp, src=P, dst=R) + x


def number_of_all_ranks(m: Module, x: Tensor) -> Tensor:
    """Right: a number that all ranks have told each other is one number."""
    count = declare_sum((own_rows(m, x) > -99).sum().reshape(1), m.tp)
    (n,) = read_ints(redistribute(count, m.tp, src=P, dst=R))
    return x * n + torch.ones(n + 1).sum()


def read_at_once(m: Module, x: Tensor) -> Tensor:
    """The result of a collective is read where it arrives: torch waits for it out of sight."""
    one = torch.ones_like(x.select(1, 0), dtype=torch.int64).sum(0, keepdim=True)
    lengths = redistribute(one, m.mesh[DP], src=S(0), dst=R).tolist()
    return x * len(lengths)


def scaled(m: Module, x: Tensor) -> Tensor:
    shape = ShardShape.even(x.shape[0], m.tp.size)
    own = redistribute(x, m.tp, src=R, dst=S(0), shape=shape)
    return declare_sum(own.sum(0), m.tp) * (m.tp.rank + 1)


def bare_sum(m: Module, x: Tensor) -> Tensor:
    own = redistribute(x, m.tp, src=R, dst=S(1))
    y: Tensor = spmd_types.all_reduce(own.sum(0), m.tp.group, src=P, dst=R)
    return y


def v_to_p(m: Module, x: Tensor) -> Tensor:
    own = redistribute(x, m.tp, src=R, dst=S(1))
    y: Tensor = spmd_types.all_reduce(own.sum(0), m.tp.group, src=V, dst=R)
    return y


def detached(m: Module, x: Tensor) -> Tensor:
    return x + x.detach()


def of_data(m: Module, x: Tensor) -> Tensor:
    return x + x.data


def under_no_grad(m: Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        own = redistribute(x * 1, m.tp, src=R, dst=S(1))
        all_ = redistribute(own, m.tp, src=S(1), dst=R)
    return x + all_


def retyped(m: Module, x: Tensor) -> Tensor:
    own = redistribute(x, m.tp, src=R, dst=S(1))
    y: Tensor = spmd_types.mutate_type(own.clone(), m.tp.group, src=V, dst=R)
    return y


def unchecked(m: Module, x: Tensor) -> Tensor:
    with spmd_types.no_typecheck():
        y = x.tolist()
    return x * len(y)


def softmax_of_a_shard(m: Module, x: Tensor) -> Tensor:
    own = redistribute(x, m.tp, src=R, dst=S(1))
    return redistribute(own.softmax(-1), m.tp, src=S(1), dst=R)


def softmax_beside_a_shard(m: Module, x: Tensor) -> Tensor:
    """Right: the other dim is cut."""
    shape = ShardShape.even(x.shape[0], m.tp.size)
    own = redistribute(x, m.tp, src=R, dst=S(0), shape=shape)
    return redistribute(own.softmax(-1), m.tp, src=S(0), dst=R, shape=shape)


def by_size(m: Module, x: Tensor) -> Tensor:
    """R -> sum -> R: few rows are not shared out."""
    shape = ShardShape.even(x.shape[0], m.tp.size)
    few = x.shape[0] < m.tp.size
    own = x if few else redistribute(x, m.tp, src=R, dst=S(0), shape=shape)
    return redistribute(declare_sum(own.sum(0), m.tp), m.tp, src=P, dst=R)


def leaves_out_a_collective(m: Module, x: Tensor) -> Tensor:
    return shared_out(m, x) if x.shape[0] else x


# --- what a target can do wrong ---------------------------------------------------------------


def raises(mesh: MoEMesh, tokens: int) -> Case:
    raise RuntimeError("no such file")


def hangs(mesh: MoEMesh, tokens: int) -> Case:
    if mesh[TP].size > 1:
        time.sleep(60)
    return good(mesh, tokens)


def no_tensor(mesh: MoEMesh, tokens: int) -> Case:
    return Case(Module(mesh, shared_out), (tokens,))


def not_built(mesh: MoEMesh, tokens: int) -> object:
    return Module(mesh, shared_out)


class Undeclared(Module):
    def __init__(self, mesh: MoEMesh, run: Step) -> None:
        super().__init__(mesh, run)
        self.scale = nn.Parameter(torch.ones(4))


class Misspelt(Module):
    wieght: Placed[Tensor, DP[R], CP[R], TP[R]]


class OnRanks(Module):
    weight: Placed[Tensor, DP[R], CP[R], TP[V]]


class InPart(Module):
    weight: Placed[Tensor, DP[R], CP[R]]


def by_name(name: str) -> Callable[[MoEMesh, int], Case]:
    """A module of torch's, whose parameters are declared by name where there is a tp."""

    def target(mesh: MoEMesh, tokens: int) -> Case:
        module = nn.Linear(4, 4)
        declare_placements(
            module, {name if mesh[TP].size > 1 else "*": Placed[Tensor, DP[R], CP[R], TP[R]]}
        )
        return Case(module, (torch.randn(tokens, 4),), (Whole,))

    return target


def of_class(kind: type[Module]) -> Callable[[MoEMesh, int], Case]:
    def target(mesh: MoEMesh, tokens: int) -> Case:
        return Case(kind(mesh, shared_out), (torch.randn(tokens, 4),), (Whole,))

    return target


def too_many_placements(mesh: MoEMesh, tokens: int) -> Case:
    return Case(Module(mesh, shared_out), (torch.randn(tokens, 4),), (Whole, Whole))


def without_tp(mesh: MoEMesh, tokens: int) -> Case:
    placed = Placed[Tensor, DP[V], CP[V]]
    return Case(Module(mesh, shared_out), (torch.randn(tokens, 4),), (placed,))


def raises_on_tp(mesh: MoEMesh, tokens: int) -> Case:
    if mesh[TP].size > 1:
        raise KeyError("tp")
    return good(mesh, tokens)


def no_placement(mesh: MoEMesh, tokens: int) -> Case:
    return Case(Module(mesh, shared_out), (torch.randn(tokens, 4),))


def elsewhere(mesh: MoEMesh, tokens: int) -> Case:
    module = Module(mesh, shared_out).to("meta")
    return Case(module, (torch.randn(tokens, 4, device="meta"),), (Whole,))


def refuses(mesh: MoEMesh, tokens: int) -> Case:
    raise ValueError("it needs 3 ranks of tp")


def interrupted(mesh: MoEMesh, tokens: int) -> Case:
    if mesh[TP].size > 1:
        os.kill(os.getpid(), signal.SIGINT)
    return good(mesh, tokens)


def leaves(mesh: MoEMesh, tokens: int) -> Case:
    sys.exit(0)


def fails_in_forward(m: Module, x: Tensor) -> Tensor:
    raise KeyError("expert")


bad_sum, failing = of(by_size), of(fails_in_forward)
