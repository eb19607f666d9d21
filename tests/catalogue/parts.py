"""Small correct modules of the kinds that the layer has not: what some of the bugs are put into."""

# Shape letters in this file:
#   T  tokens    D  model width    F  hidden width    E  experts    B  sequences    L  length
#   C  capacity: the most rows of an expert

from __future__ import annotations

import torch
import torch.distributed as dist  # noqa: F401  # for the bugs
import torch.nn.functional as F
from torch import Tensor, nn

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DENSE, DP, EDP, EP, ETP, TP, I, P, Placed, R, S, V
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.selection_bias import update_selection_bias
from tests.catalogue.data import drawn

Same = Placed[Tensor, DP[V], CP[V], TP[I]]
Whole = Placed[Tensor, DP[V], CP[V], TP[R]]
Own = Placed[Tensor, DP[V], CP[V], TP[V]]
Expert = Placed[Tensor, EDP[R], EP[S[0]], ETP[R]]
Dense = Placed[Tensor, EDP[R], EP[R], ETP[R]]
Rows = Placed[Tensor, EDP[V], EP[V], ETP[R]]
RowParts = Placed[Tensor, EDP[V], EP[V], ETP[P]]


class ExpertsOnTP(nn.Module):
    """All tokens on every rank of tp, which has some of the experts."""

    gate: Placed[Tensor, DP[R], CP[R], TP[I]]
    up: Placed[Tensor, DP[R], CP[R], TP[S[0]]]

    def __init__(self, mesh: MoEMesh, experts: int, width: int) -> None:
        super().__init__()
        self.tp = mesh[TP]
        self.gate = nn.Parameter(drawn(1, experts, width))
        self.up = nn.Parameter(drawn(2, experts, width, width).chunk(self.tp.size)[self.tp.rank])

    def forward(self, x: Same) -> Same:
        scores = F.linear(x, self.gate).softmax(-1)
        mine = redistribute(scores, self.tp, src=I, dst=S(1))
        rows = redistribute(x, self.tp, src=I, dst=R)
        y = torch.einsum("td,efd,te->tf", rows, self.up, mine)
        return redistribute(declare_sum(y, self.tp), self.tp, src=P, dst=I)


class Batched(nn.Module):
    """Sequences are flattened to tokens, and tokens are sharded."""

    weight: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, mesh: MoEMesh, width: int) -> None:
        super().__init__()
        self.tp = mesh[TP]
        self.weight = nn.Parameter(drawn(1, width, width))

    def forward(self, x_BLD: Whole) -> Whole:
        x = x_BLD.flatten(0, 1)
        shape = ShardShape.even(x.shape[0], self.tp.size)
        own = redistribute(x, self.tp, src=R, dst=S(0), shape=shape)
        y = F.silu(F.linear(own, self.weight))
        y = redistribute(y, self.tp, src=S(0), dst=R, shape=shape)
        return y.view(x_BLD.shape)


class Capacity(nn.Module):
    """Rows in a buffer of equal room for each expert, of which each rank of tp does a part."""

    weight: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, mesh: MoEMesh, experts: int, width: int) -> None:
        super().__init__()
        self.tp, self.experts = mesh[TP], experts
        self.weight = nn.Parameter(drawn(1, experts, width, width))

    def forward(self, x: Whole) -> Whole:
        n, room = self.tp.size, x.shape[0] * self.tp.size
        buffer = torch.cat([x] * (n * self.experts))  # [E*C, D]
        own = redistribute(buffer.view(self.experts, room, -1), self.tp, src=R, dst=S(1))
        z = own.reshape(self.experts, room // n, -1)
        y = F.silu(torch.bmm(z, self.weight))
        y = redistribute(y, self.tp, src=S(1), dst=R)
        return y.sum(0).narrow(0, 0, x.shape[0])


class ClipNorm(nn.Module):
    """The norm of all gradients, on all ranks that hold them."""

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.ep, self.edp = mesh[EP], mesh[EDP]

    def forward(self, dense: Dense, experts: Expert) -> Dense:
        squares = experts.square().sum()
        squares = redistribute(declare_sum(squares, self.ep), self.ep, src=P, dst=R)
        return (squares + dense.square().sum()).sqrt()


class Lora(nn.Module):
    """An expert cut along its hidden width, with a small adapter beside it."""

    down: Placed[Tensor, EDP[R], EP[R], ETP[S[1]]]
    narrow: Placed[Tensor, EDP[R], EP[R], ETP[S[1]]]
    wide: Placed[Tensor, EDP[R], EP[R], ETP[R]]

    def __init__(self, mesh: MoEMesh, width: int) -> None:
        super().__init__()
        self.etp = mesh[ETP]
        n, r = self.etp.size, self.etp.rank
        self.down = nn.Parameter(drawn(1, width, width).chunk(n, 1)[r].contiguous())
        self.narrow = nn.Parameter(drawn(2, 2, width).chunk(n, 1)[r].contiguous())
        self.wide = nn.Parameter(drawn(3, width, 2))

    def forward(self, h: Placed[Tensor, EDP[V], EP[V], ETP[S[1]]]) -> RowParts:
        base = declare_sum(F.linear(h, self.down), self.etp)
        small = declare_sum(F.linear(h, self.narrow), self.etp)
        return base + torch.matmul(small, self.wide.T)


class BiasUpdate(nn.Module):
    """A push to the selection bias after a step, from the choices of all tokens."""

    gate: Placed[Tensor, DP[R], CP[R], TP[R]]
    bias: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, mesh: MoEMesh, experts: int, width: int) -> None:
        super().__init__()
        self.mesh, self.tp, self.experts = mesh, mesh[TP], experts
        self.gate = nn.Parameter(drawn(1, experts, width))
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Own) -> Own:
        scores = F.linear(x, self.gate).softmax(-1)
        with torch.no_grad():
            counts = F.one_hot((scores + self.bias).argmax(-1), self.experts).sum(0)
            local = counts.sum()
            for role in DENSE:
                axis = self.mesh[role]
                counts = redistribute(declare_sum(counts, axis), axis, src=P, dst=R)
            mean = counts.sum() / self.experts
            self.bias.add_(0.1 * torch.sign(mean - counts))
        return scores * (1 + local)


class Metrics(nn.Module):
    """One number for each layer that the configuration names, summed over the ranks."""

    gate: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, mesh: MoEMesh, experts: int, width: int) -> None:
        super().__init__()
        self.mesh, self.layers = mesh, 3
        self.gate = nn.Parameter(drawn(1, experts, width))

    def forward(self, x: Own) -> tuple[Own, Placed[Tensor, DP[R], CP[R], TP[V]]]:
        scores = F.linear(x, self.gate).softmax(-1)
        dp = self.mesh[DP]
        sums = [scores.sum() * n for n in range(self.layers)]
        told = declare_sum(torch.stack(sums), dp)
        return scores, redistribute(told, dp, src=P, dst=R).sum()


class PaddedCombine(nn.Module):
    """Slots without a token hold uninitialized memory, and none of it comes through."""

    gate: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, mesh: MoEMesh, experts: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(drawn(1, experts, width))

    def forward(self, x: Own, valid: Own) -> Own:
        rows = torch.where(valid.unsqueeze(-1), x, 0.0)
        weight = F.linear(rows, self.gate).sigmoid().sum(-1, keepdim=True)
        return rows * torch.where(valid.unsqueeze(-1), weight, 0.0)


class Step(nn.Module):
    """An evaluation, a forward of the layer, and the push to its bias."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.eval()(x)
        out = self.layer.train()(x)
        with torch.no_grad():
            self.layer.router.seen_E += out.counts_E
        update_selection_bias([self.layer.router], self.layer.mesh, 0.1)
        hidden: Tensor = out.hidden
        return hidden
