"""Numbers that are the same on every layout: what a rank gets is a slice of one whole."""

# Shape letters in this file:
#   T  tokens    D  model width

from __future__ import annotations

import torch
from torch import Tensor

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DP, TP
from spmd_moe.core.shard_shape import ShardShape


def drawn(stream: int, *shape: int) -> Tensor:
    """Random numbers that depend on the arguments alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(stream)) * 0.5


def cell_rows(mesh: MoEMesh, tokens: int, width: int, stream: int = 0) -> Tensor:
    """The tokens of this rank's cell of dp and cp, [T, D], all of them."""
    dp, cp = mesh[DP], mesh[CP]
    rows = drawn(100 + stream, dp.size * cp.size * tokens, width)
    return rows.narrow(0, (dp.rank * cp.size + cp.rank) * tokens, tokens).contiguous()


def own_rows(whole: Tensor, mesh: MoEMesh) -> Tensor:
    """This rank of tp's share of them."""
    tp = mesh[TP]
    shape = ShardShape.even(whole.shape[0], tp.size)
    return whole.narrow(0, shape.offsets[tp.rank], shape.sizes[tp.rank]).contiguous()
