"""Initial values that depend on the seed and on the global index alone, never on the layout.

Row g of a parameter (for the experts' weights, expert g) has a random stream of its own, named by
the seed, the parameter and g. A rank draws the rows that it has, whole, and keeps its part of each.
"""

from __future__ import annotations

import hashlib

import torch
from spmd_types import Shard
from torch import Tensor, nn

from spmd_moe.declare import declared
from spmd_moe.mesh import MoEMesh
from spmd_moe.placement import Placement


@torch.no_grad()
def init_weights(layer: nn.Module, mesh: MoEMesh, seed: int, std: float = 0.02) -> None:
    """Normal weights and zero biases, for all parameters; all of them must declare a placement."""
    for prefix, module in layer.named_modules():
        placements = declared(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("b"):
                parameter.zero_()
            else:
                _draw(parameter, f"{seed}/{prefix}.{name}", placements[name], mesh, std)
        for name, buffer in module.named_buffers(recurse=False):
            if name in placements:
                buffer.zero_()


def _draw(out: Tensor, stream: str, placement: Placement, mesh: MoEMesh, std: float) -> None:
    first, whole, parts = 0, list(out.shape), []
    for k in placement:
        if isinstance(k.kind, Shard):
            axis, dim = mesh[k.role], k.kind.dim
            whole[dim] *= axis.size
            if dim == 0:
                first = axis.rank * out.shape[0]
            else:
                parts.append((dim - 1, axis.rank * out.shape[dim], out.shape[dim]))
    for i, row in enumerate(out):
        seed = hashlib.sha256(f"{stream}/{first + i}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        drawn = torch.randn(whole[1:], generator=generator) * std
        for dim, start, size in parts:
            drawn = drawn.narrow(dim, start, size)
        row.copy_(drawn)
