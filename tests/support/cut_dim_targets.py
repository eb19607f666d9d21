"""Modules that use a sharded dim in a wrong way, each beside a correct one."""

# Shape letters in this file:
#   T  tokens    D  model width    F  hidden width    B  sequences    L  length    H  heads

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd_moe.check import Case
from spmd_moe.core.collectives import declare_sum, exchange
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DP, TP, P, Placed, R, S, V
from spmd_moe.core.redistribute import redistribute

Whole = Placed[Tensor, DP[V], CP[V], TP[R]]
Rows = Placed[Tensor, DP[V], CP[V], TP[S[0]]]
Own = Placed[Tensor, DP[V], CP[V], TP[V]]
Step = Callable[["Parts", Tensor], Tensor]


class Parts(nn.Module):
    """Weights that are cut along their features; the tests differ in what is done with them."""

    up_FD: Placed[Tensor, DP[R], CP[R], TP[S[0]]]
    down_DF: Placed[Tensor, DP[R], CP[R], TP[S[1]]]
    whole_DD: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, mesh: MoEMesh, run: Step) -> None:
        super().__init__()
        self.tp, self.run = mesh[TP], run
        n = 16 // self.tp.size
        self.up_FD = nn.Parameter(torch.randn(n, 8))
        self.down_DF = nn.Parameter(torch.randn(8, n))
        self.whole_DD = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Whole) -> Tensor:
        y = F.linear(x, self.whole_DD)
        return self.run(self, y) + 0 * (self.up_FD.sum() + self.down_DF.sum())


class PartsOfOwn(Parts):
    """The same for rows that each rank has of its own."""

    def forward(self, x: Own) -> Tensor:
        y = F.linear(x, self.whole_DD)
        return self.run(self, y) + 0 * (self.up_FD.sum() + self.down_DF.sum())


def of(run: Step) -> Callable[[MoEMesh, int], Case]:
    def target(mesh: MoEMesh, tokens: int) -> Case:
        rows = -(-tokens // mesh[TP].size) * mesh[TP].size
        return Case(Parts(mesh, run), (torch.randn(rows, 8),), (Whole,))

    return target


def of_own(run: Step) -> Callable[[MoEMesh, int], Case]:
    def target(mesh: MoEMesh, tokens: int) -> Case:
        return Case(PartsOfOwn(mesh, run), (torch.randn(tokens, 8),), (Own,))

    return target


def of_sequences(run: Step) -> Callable[[MoEMesh, int], Case]:
    def target(mesh: MoEMesh, tokens: int) -> Case:
        length = -(-tokens // mesh[TP].size) * mesh[TP].size
        return Case(Parts(mesh, run), (torch.randn(2, length, 8),), (Whole,))

    return target


# --- one axis, two dims -------------------------------------------------------------------------


def own_rows_by_own_features(m: Parts, x: Tensor) -> Tensor:
    own = redistribute(x, m.tp, src=R, dst=S(0))
    return F.linear(own, m.up_FD)


def own_rows_by_own_features_einsum(m: Parts, x: Tensor) -> Tensor:
    own = redistribute(x, m.tp, src=R, dst=S(0))
    return torch.einsum("td,fd->tf", own, m.up_FD)


def own_rows_times_own_features(m: Parts, x: Tensor) -> Tensor:
    own = redistribute(x.sum(1), m.tp, src=R, dst=S(0))
    return own.unsqueeze(1) * m.up_FD.sum(1)


def other_rows_by_own_features(m: Parts, x: Tensor) -> Tensor:
    """For rows that are V."""
    return F.linear(x, m.up_FD)


def received_rows_by_own_features(m: Parts, x: Tensor) -> Tensor:
    """Right, for rows that are V: each rank has one expert, and gets the rows of it."""
    mine = [x.shape[0] if rank == m.tp.rank else 0 for rank in range(m.tp.size)]
    return F.linear(exchange(x, m.tp.group, receives=mine, sends=mine), m.up_FD)


def own_keys_first(m: Parts, x: Tensor) -> Tensor:
    """Right: the first step of ring attention."""
    own = redistribute(x, m.tp, src=R, dst=S(0))
    y = own @ own.t()  # spmd: allow shard - the first step of a ring
    return y.sum(1)


def all_rows_by_own_features(m: Parts, x: Tensor) -> Tensor:
    """Right: every rank has all rows, and the products are parts of a sum."""
    h = F.silu(F.linear(x, m.up_FD))
    return redistribute(declare_sum(F.linear(h, m.down_DF), m.tp), m.tp, src=P, dst=R)


def all_rows_by_own_features_einsum(m: Parts, x: Tensor) -> Tensor:
    """Right, too."""
    h = F.silu(torch.einsum("td,fd->tf", x, m.up_FD))
    y = torch.einsum("tf,df->td", h, m.down_DF)
    return redistribute(declare_sum(y, m.tp), m.tp, src=P, dst=R)


# --- views --------------------------------------------------------------------------------------


def unflattened_as_the_whole(m: Parts, x: Tensor) -> Tensor:
    own = redistribute(x.flatten(0, 1), m.tp, src=R, dst=S(0))
    return own.view(2, own.shape[0] // 2, 8).mean(1)  # of each sequence


def unflattened_by_length(m: Parts, x: Tensor) -> Tensor:
    """Right: the sequences are cut, and each is whole."""
    own = redistribute(x.flatten(0, 1), m.tp, src=R, dst=S(0))
    return own.view(-1, x.shape[1], 8).mean(1) if x.shape[1] else own


def one_head_is_left(m: Parts, x: Tensor) -> Tensor:
    h = F.linear(x, m.up_FD).unflatten(-1, (-1, 8))  # [T, H, 8]: of 2 heads, 1 is here
    return redistribute(h.reshape(-1, 8), m.tp, src=S(0), dst=R)


def heads_side_by_side(m: Parts, x: Tensor) -> Tensor:
    """Right: heads are merged with what is inside of them."""
    h = F.linear(x, m.up_FD).unflatten(-1, (-1, 8))
    return redistribute(h.flatten(1), m.tp, src=S(1), dst=R)


# --- parts of a dim -----------------------------------------------------------------------------


def halves_of_a_part(m: Parts, x: Tensor) -> Tensor:
    gate, up = F.linear(x, m.up_FD).chunk(2, -1)
    return F.silu(gate) * up


def slices_of_a_part(m: Parts, x: Tensor) -> Tensor:
    h = F.linear(x, m.up_FD)
    half = h.shape[-1] // 2
    return F.silu(h[..., :half]) * h[..., half:]


def narrowed_part(m: Parts, x: Tensor) -> Tensor:
    h = F.linear(x, m.up_FD)
    half = h.shape[-1] // 2
    return F.silu(h.narrow(-1, 0, half)) * h.narrow(-1, half, half)


def neighbors(m: Parts, x: Tensor) -> Tensor:
    own = redistribute(x, m.tp, src=R, dst=S(0))
    return own[1:] - own[:-1]


def rotated(m: Parts, x: Tensor) -> Tensor:
    a, b = F.linear(x, m.up_FD).chunk(2, -1)
    return torch.cat([-b, a], -1)


def halves_of_the_whole(m: Parts, x: Tensor) -> Tensor:
    """Right: the dim is whole on every rank."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def pairs(m: Parts, x: Tensor) -> Tensor:
    """Right: the two of a pair stand side by side, and no shard ends between them."""
    h = F.linear(x, m.up_FD)
    return F.silu(h[..., ::2]) * h[..., 1::2]


def rows_in_pieces(m: Parts, x: Tensor) -> Tensor:
    """Right: every piece is treated alike, and they are put together again."""
    own = redistribute(x, m.tp, src=R, dst=S(0))
    done = torch.cat([F.silu(piece) for piece in own.split(2)]) if own.shape[0] else own
    return redistribute(done, m.tp, src=S(0), dst=R)


# --- random numbers -----------------------------------------------------------------------------


def dropout_of_the_same(m: Parts, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def noise_on_the_same(m: Parts, x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def noise_in_place(m: Parts, x: Tensor) -> Tensor:
    return x + torch.empty_like(x).exponential_()


def dropout_of_own_rows(m: Parts, x: Tensor) -> Tensor:
    """Right: rows of different tokens, different numbers."""
    own = redistribute(x, m.tp, src=R, dst=S(0))
    return redistribute(F.dropout(own, 0.5), m.tp, src=S(0), dst=R)


def noise_of_a_generator(m: Parts, x: Tensor) -> Tensor:
    """Right: every rank draws the same."""
    return x + torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(3))


def noise_of_a_generator_of_the_rank(m: Parts, x: Tensor) -> Tensor:
    return x + torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(m.tp.rank))


def dropout_of_a_seed_of_the_rank(m: Parts, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3 + m.tp.rank)
        return F.dropout(x, 0.5)


def dropout_of_a_seed(m: Parts, x: Tensor) -> Tensor:
    """Right, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return F.dropout(x, 0.5)


def no_dropout(m: Parts, x: Tensor) -> Tensor:
    """Right: nothing is drawn."""
    return F.dropout(x, 0.5, training=False)
