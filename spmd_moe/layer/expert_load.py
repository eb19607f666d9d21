"""How evenly the experts are used: one record, one call."""

# Shape letters in this file:
#   E  experts

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import DENSE, P, R, Whole
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.validate import check_instance
from spmd_moe.layer.moe_output import MoEOutput


@final
@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """What the tokens of all ranks chose. Tensors, so that reading them waits for nothing."""

    counts_E: Whole  # int64: choices of each expert
    max_over_mean: Whole  # 1 when all experts are used alike, E when one is used alone
    entropy: Whole  # of the shares of the experts, 1 when used alike, 0 when one is used alone
    dropped: Whole  # int64: choices of unmasked tokens of no expert, or without room

    def __str__(self) -> str:
        return (
            f"{int(self.counts_E.sum())} choices of {self.counts_E.numel()} experts: "
            f"max/mean {float(self.max_over_mean):.2f}, entropy {float(self.entropy):.3f}, "
            f"dropped {int(self.dropped)}"
        )


@torch.no_grad()
# spmd: allow bypass - counts have no gradient
def expert_load(output: MoEOutput, mesh: MoEMesh) -> ExpertLoad:
    """Compute how evenly one forward used the experts, over all ranks.

    Every rank must call it.

    Args:
        output: What the layer returned.
        mesh: The mesh of the layer.

    Returns:
        Global counts, max/mean, entropy and dropped choices, as tensors; `print` shows one line.

    Raises:
        ConfigError: `output` is not a `MoEOutput`.

    Example:
        >>> import torch
        >>> from spmd_moe import expert_load
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> int(expert_load(layer(torch.ones(3, 8)), mesh).counts_E.sum())
        6
    """
    check_instance("expert_load", "output", output, MoEOutput, "expert_load(layer(x), mesh)")
    check_mesh("expert_load", mesh)
    sums = torch.cat([output.counts_E, output.dropped.view(1)])
    for role in DENSE:
        sums = redistribute(sums, mesh[role], src=P, dst=R)
    sums = sums.clone()  # waited for, so that a record has plain tensors
    experts = output.counts_E.shape[0]
    counts_E = sums.narrow(0, 0, experts)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return ExpertLoad(counts_E, share_E.max() * experts, _entropy(share_E), sums.select(0, experts))


def _entropy(share_E: Whole) -> Whole:
    """From 0 to 1; of one expert alone, and of no choices at all, 0."""
    most = torch.log(torch.full_like(share_E.select(0, 0), max(share_E.shape[0], 2)))
    # spmd: allow unknown - torch does not type it
    summed: Whole = torch.special.entr(share_E).sum()
    return summed / most
