"""Initial values that depend on the seed and on the global index alone, never on the layout.

Row g of a parameter (for the experts' weights, expert g) has a random stream of its own, named by
the seed, the parameter and g. A rank draws the rows that it has, whole, and keeps its part of each,
also where `parallelize` has cut them once more.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

from spmd_moe.declare import declared
from spmd_moe.errors import ConfigError, PlacementError, explain
from spmd_moe.mesh import MoEMesh
from spmd_moe.placement import Placement
from spmd_moe.settings import instance
from spmd_moe.storage import local, place_in_whole, settled, whole_shape

_BIAS = re.compile(r"(bias|b\d*)(_[A-Za-z]+)?")


@torch.no_grad()
def init_weights(layer: nn.Module, mesh: MoEMesh, seed: int, std: float = 0.02) -> None:
    """Normal weights and zero biases, for all parameters; all of them must declare a placement.

    `std` is the standard deviation of every weight, of a norm's scale too: set such ones after it.
    Biases are named `bias`, `b1_eF` and the like. Every rank must call it, with the same seed.
    """
    instance("init_weights", "mesh", mesh, MoEMesh, "init_weights(layer, layer.mesh, seed=0)")
    mesh.agree("init_weights", {"seed": seed, "std": std})
    _check(layer, mesh)
    for prefix, module in settled(layer).named_modules():
        placements = declared(module)
        for name, parameter in module.named_parameters(recurse=False):
            if _BIAS.fullmatch(name):
                parameter.zero_()
            else:
                _draw(parameter, f"{seed}/{prefix}.{name}", placements[name], mesh, std)
        for name, buffer in module.named_buffers(recurse=False):
            if name in placements:
                buffer.zero_()


def _check(layer: nn.Module, mesh: MoEMesh) -> None:
    """Nothing is drawn unless everything can be."""
    undeclared = []
    for prefix, module in layer.named_modules():
        own = getattr(module, "mesh", mesh)
        if isinstance(own, MoEMesh) and not own.same_layout(mesh):
            raise ConfigError(
                explain(
                    "init_weights",
                    f"the layer is on {own}, but mesh is {mesh}",
                    why="a rank draws the part of each weight that its place on the mesh gives it",
                    fixes=["init_weights(layer, layer.mesh, seed=0)"],
                )
            )
        placements = declared(module)
        names = (name for name, _ in module.named_parameters(prefix, recurse=False))
        undeclared += [name for name in names if name.rpartition(".")[2] not in placements]
    if undeclared:
        raise PlacementError(
            explain(
                "init_weights",
                f"no placement is declared for {', '.join(undeclared)}",
                why="which part of the whole a rank has is read from the declaration",
                fixes=[
                    "init_weights(model.moe, mesh, seed=0)   # the layer alone",
                    "weight: Placed[Tensor, DP[R], CP[R], TP[R]]   # in the body of the class",
                    "declare(model, {'head.*': Placed[...]})   # of modules of other people",
                ],
            )
        )


def _draw(out: Tensor, stream: str, placement: Placement, mesh: MoEMesh, std: float) -> None:
    whole, (first, *starts) = (f(placement, mesh, out) for f in (whole_shape, place_in_whole))
    for i, row in enumerate(local(out)):
        seed = hashlib.sha256(f"{stream}/{first + i}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        drawn = torch.randn(whole[1:], generator=generator) * std
        for dim, start in enumerate(starts):
            drawn = drawn.narrow(dim, start, row.shape[dim])
        row.copy_(drawn)
