"""Correct Mixture-of-Experts modules as others write them: not one of them uses the layer.

Tokens gathered over ep; experts cut along their hidden width over tp; DTensors.
"""

# Shape letters in this file:
#   T  tokens    D  model width    F  hidden width    E  experts    e  experts on this rank

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DP, EDP, EP, ETP, TP, I, P, Placed, R, S, V
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from tests.catalogue.data import drawn

Rows = Placed[Tensor, EDP[V], EP[V], ETP[R]]


class GatherEP(nn.Module):
    """Every rank of ep sees all tokens, computes its own experts, and the parts are added up."""

    gate: Placed[Tensor, EDP[R], EP[R], ETP[R]]
    up: Placed[Tensor, EDP[R], EP[S[0]], ETP[R]]
    down: Placed[Tensor, EDP[R], EP[S[0]], ETP[R]]

    def __init__(self, mesh: MoEMesh, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.ep, self.experts = mesh[EP], experts
        own = slice(
            self.ep.rank * experts // self.ep.size, (self.ep.rank + 1) * experts // self.ep.size
        )
        self.gate = nn.Parameter(drawn(1, experts, width))
        self.up = nn.Parameter(drawn(2, experts, hidden, width)[own])
        self.down = nn.Parameter(drawn(3, experts, width, hidden)[own])

    def forward(self, x: Rows) -> tuple[Rows, Placed[Tensor, EDP[V], EP[R], ETP[R]]]:
        everyone = redistribute(x, self.ep, src=S(0), dst=R)
        probs = F.linear(everyone, self.gate).softmax(-1)
        weight, chosen = probs.max(-1)
        numbers = torch.arange(self.experts)
        mine = redistribute(numbers, self.ep, src=R, dst=S(0))
        y = self.computed(everyone, mine, chosen, weight)
        y = declare_sum(y, self.ep)
        return redistribute(y, self.ep, src=P, dst=S(0)), self.load(x)

    def computed(self, x: Tensor, mine: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for up, down, number in zip(self.up, self.down, mine, strict=True):
            share = torch.where(chosen == number, weight, 0.0)
            y = y + share.unsqueeze(-1) * F.linear(F.silu(F.linear(x, up)), down)
        return y

    def load(self, x: Tensor) -> Tensor:
        """How many tokens of all ranks chose each expert."""
        chosen = F.linear(x, self.gate).argmax(-1)
        counts = F.one_hot(chosen, self.experts).sum(0)
        return redistribute(declare_sum(counts, self.ep), self.ep, src=P, dst=R)


Whole = Placed[Tensor, DP[V], CP[V], TP[I]]


class ShardedTP(nn.Module):
    """Every rank of tp has all tokens and a slice of each expert; a shared expert is whole."""

    gate: Placed[Tensor, DP[R], CP[R], TP[I]]
    up: Placed[Tensor, DP[R], CP[R], TP[S[1]]]
    down: Placed[Tensor, DP[R], CP[R], TP[S[2]]]
    bias: Placed[Tensor, DP[R], CP[R], TP[I]]
    beside: Placed[Tensor, DP[R], CP[R], TP[I]]

    def __init__(self, mesh: MoEMesh, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.tp, self.experts, self.sharded = mesh[TP], experts, mesh[TP].size > 1
        n, r = self.tp.size, self.tp.rank
        self.gate = nn.Parameter(drawn(1, experts, width))
        self.up = nn.Parameter(drawn(2, experts, hidden, width).chunk(n, 1)[r].contiguous())
        self.down = nn.Parameter(drawn(3, experts, width, hidden).chunk(n, 2)[r].contiguous())
        self.bias = nn.Parameter(drawn(4, experts, width))
        self.beside = nn.Parameter(drawn(5, width, width))

    def forward(self, x: Whole) -> tuple[Whole, Placed[Tensor, DP[V], CP[V], TP[I]]]:
        probs = F.linear(x, self.gate).softmax(-1)
        weight, chosen = probs.max(-1)
        one_hot = F.one_hot(chosen, self.experts).to(x.dtype) * weight.unsqueeze(-1)
        y = redistribute(self.routed(x, one_hot), self.tp, src=P, dst=I)
        y = y + one_hot @ self.bias
        y = y + F.linear(x, self.beside)
        return y, self.load(chosen)

    def routed(self, x: Tensor, one_hot: Tensor) -> Tensor:
        x = redistribute(x, self.tp, src=I, dst=R)
        share = redistribute(one_hot, self.tp, src=I, dst=R)
        parts = [
            F.linear(F.silu(F.linear(x, up)), down) * share.select(1, e).unsqueeze(-1)
            for e, (up, down) in enumerate(zip(self.up, self.down, strict=True))
        ]
        y = torch.stack(parts).sum(0)
        return declare_sum(y, self.tp)

    def load(self, chosen: Tensor) -> Tensor:
        """Counted once: each rank of tp counts its share of the tokens."""
        shape = ShardShape.even(chosen.shape[0], self.tp.size)
        own = redistribute(chosen, self.tp, src=I, dst=S(0), shape=shape)
        counts = F.one_hot(own, self.experts).sum(0)
        return redistribute(declare_sum(counts, self.tp), self.tp, src=P, dst=I)


class OnDTensors(nn.Module):
    """The hidden width over tp, placed by torch's own tensors."""

    def __init__(self, mesh: MoEMesh, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.experts, self.tp = experts, mesh.dense["tp"]
        self.ranks = self.tp.size()
        self.gate = self._placed(drawn(1, experts, width), Replicate())
        self.up = self._placed(drawn(2, experts, hidden, width), Shard(1))
        self.down = self._placed(drawn(3, experts, width, hidden), Shard(2))

    def _placed(self, whole: Tensor, placement: Replicate | Shard) -> nn.Parameter:
        everywhere = DTensor.from_local(whole, self.tp, [Replicate()], run_check=False)
        return nn.Parameter(everywhere.redistribute(placements=[placement]))

    def forward(self, x: DTensor) -> tuple[Tensor, Tensor]:
        """`x` is whole on every rank."""
        probs = torch.matmul(x, self.gate.t()).softmax(-1)
        y = torch.zeros_like(x)
        for e in range(self.experts):
            up, down = self.up.select(0, e), self.down.select(0, e)
            part = torch.matmul(F.silu(torch.matmul(x, up.t())), down.t())
            assert isinstance(part, DTensor)
            y = y + part.redistribute(placements=[Replicate()]) * probs.narrow(1, e, 1)
        assert isinstance(probs, DTensor)
        return y, self.load(x, probs)

    def load(self, x: DTensor, probs: DTensor) -> Tensor:
        """The probability that each expert gets of all tokens, of which each rank adds a share."""
        own = probs.redistribute(placements=[Shard(0)])
        share = DTensor.from_local(own.to_local().sum(0), self.tp, [Partial()], run_check=False)
        return share.redistribute(placements=[Replicate()])
