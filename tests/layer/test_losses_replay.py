"""The losses where choices come from outside, and some are of no expert."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from spmd_moe import (
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    balance_loss,
    init_weights,
    reduce_loss_terms,
)

EXPERTS = 4
# Two sequences of three tokens; choices of no expert at the end of one, and next to its start.
IDS = torch.tensor([[[0, 1], [0, -1], [2, -1]], [[-1, 3], [3, 0], [-1, -1]]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def balance_of(ids: Tensor, probs: Tensor) -> Tensor:
    """Of the tokens of one group: choices of no expert are no choices, their tokens are tokens."""
    chosen = [int(e) for e in ids.flatten() if e >= 0]
    share = [chosen.count(e) / len(chosen) for e in range(EXPERTS)]
    return sum(
        (EXPERTS * f * p for f, p in zip(share, probs.mean(0), strict=True)), torch.zeros(())
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("balance", ["batch", "sequence"])
def test_choices_of_no_expert(balance: Literal["batch", "sequence"], masked: bool) -> None:
    mesh = MoEMesh.single()
    layer = MoE(MoEConfig(6, 8, RouterConfig(EXPERTS, 2), balance=balance), mesh)
    init_weights(layer, mesh, seed=0, std=1.0)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    out: Any = layer(x, MASK if masked else None, IDS)
    found = balance_loss(out.losses, reduce_loss_terms(out.losses, mesh), mesh)

    probs = (x @ layer.router.weight_ED.T).softmax(-1)
    real = MASK if masked else torch.ones_like(MASK)
    groups = (
        [real] if balance == "batch" else [real * row for row in torch.eye(2).bool()[..., None]]
    )
    want = torch.stack([balance_of(IDS[group], probs[group]) for group in groups]).mean()
    torch.testing.assert_close(found, want)
    assert want > 1.01 or want < 0.99
    assert out.dropped == (IDS[real] < 0).sum() and out.counts_E.sum() == (IDS[real] >= 0).sum()
