"""What the kinds mean, in one process: enough to check every move by hand.

A whole tensor and a kind give the tensor of each rank (`scattered`); the ranks' tensors and a kind
give the whole back (`meaning`). A move keeps the meaning and changes the kind: that is all there is
to know about its forward. Its backward is right if <A g, dx> = <g, A dx>, where the inner product
is the one that the kinds of a value and its gradient imply (`product`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from spmd_types import Shard
from torch import Tensor

from spmd_moe import I, P, ShardShape
from spmd_moe.core.placement import Kind


def scattered(whole: Tensor, kind: Kind, shape: ShardShape, ranks: int) -> list[Tensor]:
    """Tensors of the ranks that mean `whole`."""
    if isinstance(kind, Shard):
        return [part.clone() for part in whole.split(shape.sizes, kind.dim)]
    if kind is P:  # rank r > 0 holds something, and rank 0 what is missing to the whole
        parts = [(whole + r) % 7 - 3 for r in range(1, ranks)]
        return [whole - sum(parts, torch.zeros_like(whole)), *parts]
    return [whole.clone() for _ in range(ranks)]


def meaning(tensors: Sequence[Tensor], kind: Kind) -> Tensor:
    """The whole that the ranks' tensors mean together."""
    if isinstance(kind, Shard):
        return torch.cat(list(tensors), kind.dim)
    if kind is P:
        return sum(tensors[1:], tensors[0])
    for other in tensors[1:]:
        assert torch.equal(tensors[0], other), f"{kind!r}, but the ranks differ"
    return tensors[0]


def product(values: Sequence[Tensor], gradients: Sequence[Tensor], kind: Kind) -> float:
    """<value, gradient> of a value of this kind.

    R pairs with P, P with R and S with S: each rank has a part of the sum. I pairs with I, where
    every rank has the same, all of it.
    """
    ranks = 1 if kind is I else len(values)
    return sum((v * g).sum().item() for v, g in zip(values[:ranks], gradients[:ranks], strict=True))


def integers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers in float64, whose sums and products are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(torch.float64)
