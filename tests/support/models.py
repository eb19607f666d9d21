"""Whole models for tests: a small language model with MoE blocks, its batch, and its loss.

`own_tokens` says how the model outside of the layers is on tp: every rank has tokens of its own
(weights R there), or all have the same (weights I).
"""

# Shape letters in this file:
#   T  tokens of this rank    D  model width    N  words of the vocabulary

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from spmd_types import Shard
from torch import Tensor, nn

from spmd_moe import (
    CP,
    DP,
    TP,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    Placement,
    R,
    RouterConfig,
    ShardShape,
    SharedConfig,
    balance_loss,
    declare_placements,
    init_weights,
    reduce_loss_terms,
    z_loss,
)
from tests.support.layer_layouts import Layout

WORDS, WIDTH, TOKENS = 11, 8, 13
ROUTER = RouterConfig(8, top_k=2, score_func="sigmoid", route_norm=True, dtype=torch.float64)
CONFIG = MoEConfig(
    dim=WIDTH,
    hidden_dim=16,
    router=ROUTER,
    bias=True,
    shared=SharedConfig(16, gated=True, sharded=True),
    balance="batch",
)


class Block(nn.Module):
    """A norm of torch's own, and a layer."""

    def __init__(self, config: MoEConfig, mesh: MoEMesh) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.moe = MoE(config, mesh)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and this layer's part of the loss."""
        out = self.moe(self.norm(x_TD))
        assert out.losses is not None
        total = reduce_loss_terms(out.losses, self.moe.mesh)
        extra = 0.01 * balance_loss(out.losses, total, self.moe.mesh)
        return x_TD + out.hidden, extra + 0.001 * z_loss(out.losses, total)


class Model(nn.Module):
    """Words in, scores of the next word out."""

    def __init__(self, mesh: MoEMesh, own_tokens: bool, experts: int) -> None:
        super().__init__()
        config = replace(CONFIG, router=replace(ROUTER, num_experts=experts))
        config = config if own_tokens else replace(config, src=I, dst=I)
        self.mesh, self.own_tokens = mesh, own_tokens
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(config, mesh) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)
        whole = Placement((DP[R], CP[R], TP[R if own_tokens else I]))
        declare_placements(self, {"embedding.*": whole, "blocks.*.norm.*": whole, "head.*": whole})

    def forward(self, words_T: Tensor, next_T: Tensor) -> Tensor:
        """The loss: P on the axes over which tokens are shared out."""
        x_TD, extra = self.embedding(words_T), torch.zeros((), dtype=torch.float64)
        for block in self.blocks:
            x_TD, more = block(x_TD)
            extra = extra + more
        loss = F.cross_entropy(self.head(x_TD), next_T, reduction="sum") / TOKENS
        return loss + extra


def build(
    mesh: MoEMesh, own_tokens: bool, dtype: torch.dtype = torch.float64, experts: int = 8
) -> Model:
    """The same values on every layout."""
    model = Model(mesh, own_tokens, experts).to(dtype)
    init_weights(model, mesh, seed=0, std=0.3)
    return model


def mesh_of(layout: Layout) -> MoEMesh:
    """One process without a process group, or the mesh of the ranks that there are."""
    if layout.world == 1:
        return MoEMesh.single()
    return MoEMesh.init(
        "cpu", dp=layout.dp, cp=layout.cp, tp=layout.tp, ep=layout.ep, etp=layout.etp
    )


def batch(mesh: MoEMesh, own_tokens: bool, step: int = 0) -> tuple[Tensor, Tensor]:
    """This rank's words, and the words after them. Thirteen divide by no number of ranks."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(WORDS, (2, TOKENS), generator=generator)
    roles = (DP, CP, TP) if own_tokens else (DP, CP)
    rank, ranks = 0, 1
    for role in roles:
        rank, ranks = rank * mesh[role].size + mesh[role].rank, ranks * mesh[role].size
    shape = ShardShape.even(TOKENS, ranks)
    words_T, next_T = words.narrow(1, shape.offsets[rank], shape.sizes[rank]).unbind(0)
    return words_T, next_T


def part(whole: Tensor, placement: Placement, mesh: MoEMesh) -> Tensor:
    """This rank's part of a whole tensor."""
    for k in placement:
        if isinstance(k.kind, Shard):
            axis = mesh[k.role]
            whole = whole.chunk(axis.size, k.kind.dim)[axis.rank]
    return whole
