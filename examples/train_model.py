"""The model of examples/train.py: bytes in, the loss of the next byte out; and how it is placed.

    python examples/train_model.py                # type-checks it on a few layouts, trains nothing

Sequences are shared out over dp, and attention sees a whole one. Outside of the MoE layers all
ranks of tp compute the same (I), so that only experts differ between them; each layer shards the
tokens over tp, and gathers them again.
"""

# Shape letters in this file:
#   B  sequences of this rank    L  length    D  model width    N  values of a byte
#   H  heads    F  3 x D: queries, keys and values

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd_moe import (
    CP,
    DP,
    EP,
    ETP,
    TP,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    MoEOutput,
    P,
    Placed,
    R,
    RouterConfig,
    V,
    balance_loss,
    init_weights,
    reduce_loss_terms,
    z_loss,
)
from spmd_moe.check import Case, Layout, Report, run_checks
from spmd_moe.core.collectives import declare_sum

BYTES = 256

Hidden: TypeAlias = Placed[Tensor, DP[V], CP[V], TP[I]]
Bytes: TypeAlias = Placed[Tensor, DP[V], CP[V], TP[I]]
Weight: TypeAlias = Placed[Tensor, DP[R], CP[R], TP[I]]
Loss: TypeAlias = Placed[Tensor, DP[P], CP[P], TP[I]]


class Norm(nn.Module):
    """Each token divided by its root mean square. A scale of zero leaves it at that."""

    scale_D: Weight

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_D = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Hidden) -> Hidden:
        return F.rms_norm(x_BLD, self.scale_D.shape, 1.0 + self.scale_D)


class Attention(nn.Module):
    """Causal attention over the sequences of this rank, the same on all ranks of tp."""

    in_FD: Weight
    out_DD: Weight

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_FD = nn.Parameter(torch.zeros(3 * width, width))
        self.out_DD = nn.Parameter(torch.zeros(width, width))

    def forward(self, x_BLD: Hidden) -> Hidden:
        q, k, v = F.linear(x_BLD, self.in_FD).chunk(3, dim=-1)
        q_BHLd, k_BHLd, v_BHLd = (self._by_head(x) for x in (q, k, v))
        y_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=True)
        return F.linear(y_BHLd.transpose(1, 2).flatten(2), self.out_DD)

    def _by_head(self, x_BLD: Hidden) -> Hidden:
        sequences, length, width = x_BLD.shape
        return x_BLD.view(sequences, length, self.heads, width // self.heads).transpose(1, 2)


class Block(nn.Module):
    """Attention, then a Mixture-of-Experts layer; each adds to what came in."""

    def __init__(self, config: MoEConfig, heads: int, mesh: MoEMesh) -> None:
        super().__init__()
        self.norm_before, self.norm_between = Norm(config.dim), Norm(config.dim)
        self.attention = Attention(config.dim, heads)
        self.moe = MoE(config, mesh)

    def forward(self, x_BLD: Hidden) -> tuple[Hidden, MoEOutput]:
        x_BLD = x_BLD + self.attention(self.norm_before(x_BLD))
        out: MoEOutput = self.moe(self.norm_between(x_BLD))
        x_BLD = x_BLD + out.hidden
        return x_BLD, replace(out, hidden=x_BLD)  # the layer's own is a view: FSDP warns of those


class Model(nn.Module):
    """A language model of bytes. `tokens` of the whole batch, of all ranks, divide its loss."""

    embedding_ND: Weight
    place_LD: Weight
    head_ND: Weight

    def __init__(
        self, config: MoEConfig, mesh: MoEMesh, *, layers: int, heads: int, length: int
    ) -> None:
        super().__init__()
        self.mesh = mesh
        self.embedding_ND = nn.Parameter(torch.zeros(BYTES, config.dim))
        self.place_LD = nn.Parameter(torch.zeros(length, config.dim))
        self.blocks = nn.ModuleList(Block(config, heads, mesh) for _ in range(layers))
        self.norm = Norm(config.dim)
        self.head_ND = nn.Parameter(torch.zeros(BYTES, config.dim))

    def forward(
        self, bytes_BL: Bytes, next_BL: Bytes, tokens: int
    ) -> tuple[Loss, Loss, list[MoEOutput]]:
        """The loss per byte, what is added to it for the routers, and what each layer did."""
        x_BLD = F.embedding(bytes_BL, self.embedding_ND)
        x_BLD = x_BLD + self.place_LD.narrow(0, 0, bytes_BL.shape[1])
        outs, extras = list[MoEOutput](), list[Tensor]()
        for block in self.blocks:
            x_BLD, out = block(x_BLD)
            outs.append(out)
            extras.append(self._extra(out))
        scores_BLN = F.linear(self.norm(x_BLD), self.head_ND)
        summed = F.cross_entropy(scores_BLN.flatten(0, 1), next_BL.flatten(), reduction="sum")
        for role in (DP, CP):  # a part of the sum over all sequences
            summed = declare_sum(summed, self.mesh[role])
        return summed / tokens, torch.stack(extras).sum(0), outs

    def _extra(self, out: MoEOutput) -> Loss:
        """Keeps experts evenly used and logits small; the loss alone does neither."""
        assert out.losses is not None
        total = reduce_loss_terms(out.losses, self.mesh)
        balance = balance_loss(out.losses, total, self.mesh)
        return 0.01 * balance + 0.0001 * z_loss(out.losses, total)


def build(
    mesh: MoEMesh,
    *,
    width: int,
    hidden: int,
    layers: int,
    heads: int,
    length: int,
    experts: int,
    top_k: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """The same initial values on every layout."""
    router = RouterConfig(experts, top_k, score_func="sigmoid", route_norm=top_k > 1, dtype=dtype)
    config = MoEConfig(width, hidden, router, balance="batch", src=I, dst=I)
    model = Model(config, mesh, layers=layers, heads=heads, length=length)
    init_weights(model, mesh, seed, std=0.05)
    return model.to(dtype)


def small_model(mesh: MoEMesh, tokens: int) -> Case:
    """What the checker is pointed at: the whole model, one block deep and as narrow as can be."""
    model = build(
        mesh,
        width=16,
        hidden=16 * mesh[ETP].size,
        layers=1,
        heads=2,
        length=max(tokens, 1),
        experts=2 * mesh[EP].size,
        top_k=2,
        seed=0,
    )
    bytes_BL, next_BL = (torch.randint(BYTES, (2, tokens)) for _ in range(2))
    return Case(model, (bytes_BL, next_BL, max(2 * tokens, 1)), (Bytes, Bytes))


def type_check(layouts: Sequence[Layout], tokens: Sequence[int] = (0, 1, 6)) -> Report:
    """Trace the model on these layouts, in this process alone, with sequences of these lengths."""
    return run_checks(small_model, chosen=layouts, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    layouts = [
        Layout(),
        Layout(dp=4),
        Layout(tp=4, ep=4),
        Layout(dp=2, tp=2, ep=4),
        Layout(dp=2, tp=2, ep=2, etp=2),
    ]
    report = type_check(layouts)
    print(report)
    raise SystemExit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
