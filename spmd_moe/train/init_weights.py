"""Initial values that depend on the seed and on the global index alone, never on the layout.

Row g of a parameter (for the experts' weights, expert g) has a random stream of its own, named by
the seed, the parameter and g. A rank draws the rows that it has, whole, and keeps its part of each,
also where `parallelize` has cut them once more.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor, nn

from spmd_moe.core.declare_placements import declared
from spmd_moe.core.errors import ConfigError, PlacementError, explain
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import Placement
from spmd_moe.core.validate import check_number
from spmd_moe.layer.router import Router
from spmd_moe.train.storage_mesh import (
    cut_by_others,
    local,
    place_in_whole,
    settled,
    whole_shape,
)

_BIAS = re.compile(r"(^|_)bias(_|$)|^b\d*(_|$)")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
# What torch.compile and checkpointing call the module inside; values do not depend on them.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}


@torch.no_grad()
def init_weights(layer: nn.Module, mesh: MoEMesh, seed: int, std: float = 0.02) -> None:
    """Initialize all parameters; the values depend on the seed only, not on the layout.

    Every rank must call it. Weights are normal. Biases (named `bias`, `in_proj_bias`, `b1_eF` and
    the like) are 0, scales of torch's norms are 1. The routers' buffers are 0; other buffers keep
    their values.

    Args:
        layer: A layer or a model; all parameters must have a placement.
        mesh: The mesh.
        seed: The seed, equal on all ranks.
        std: The standard deviation of every weight.

    Raises:
        PlacementError: A parameter has no placement.
        ConfigError: `std` is negative, or a parameter is on the meta device.
        MeshError: Ranks pass different arguments.

    Example:
        >>> import torch
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> bool(torch.isfinite(layer.router.weight_ED).all())
        True
    """
    check_mesh("init_weights", mesh)
    mesh.check_ranks_agree("init_weights", {"seed": seed, "std": std})
    check_number(
        "init_weights",
        "std",
        std,
        lambda std: 0 <= std < math.inf,
        need="a finite number of 0 or more",
        why="it is the standard deviation of the weights",
        fix="std=0.02",
    )
    _check(layer, mesh)
    for prefix, module in settled(layer).named_modules():
        placements = declared(module)
        prefix = ".".join(part for part in prefix.split(".") if part not in _WRAPPED)
        for name, parameter in module.named_parameters(recurse=False):
            if _BIAS.search(name):
                parameter.zero_()
            elif isinstance(module, _NORMS) or name == "scale_E":
                parameter.fill_(1)
            else:
                _draw(parameter, f"{seed}/{prefix}.{name}", placements[name], mesh, std)
        if isinstance(module, Router):
            for buffer in (module.bias_E, module.seen_E):
                buffer.zero_()


def _check(layer: nn.Module, mesh: MoEMesh) -> None:
    """Nothing is drawn unless everything can be."""
    undeclared, unmade, foreign = [], [], []
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
        own_ones = dict(module.named_parameters(prefix, recurse=False))
        undeclared += [name for name in own_ones if name.rpartition(".")[2] not in placements]
        unmade += [name for name, parameter in own_ones.items() if parameter.is_meta]
        for name, parameter in own_ones.items():
            placement = placements.get(name.rpartition(".")[2])
            if placement is not None and cut_by_others(placement, mesh, parameter):
                foreign.append(name)
    if undeclared:
        raise PlacementError(
            explain(
                "init_weights",
                f"no placement is declared for {', '.join(undeclared)}",
                why="which part of the whole a rank has is read from the declaration",
                fixes=[
                    "init_weights(model.moe, mesh, seed=0)   # the layer alone",
                    "weight: Placed[Tensor, DP[R], CP[R], TP[R]]   # in the body of the class",
                    "declare_placements(model, {'head.*': Placed[...]})   # by name",
                ],
            )
        )
    if unmade:
        raise ConfigError(
            explain(
                "init_weights",
                f"{unmade[0]!r} is on the meta device, where nothing has a value",
                why="what is written there is forgotten",
                fixes=["model.to_empty(device='cpu')   # before it; after parallelize, if at all"],
            )
        )

    if foreign:
        raise ConfigError(
            explain(
                "init_weights",
                f"{foreign[0]!r} is cut among ranks, but not by parallelize",
                why="which part of the whole a rank has is read from how parallelize has cut it",
                fixes=[
                    "init_weights(model, mesh, seed=0)   # before fully_shard",
                    "parallelize(model, mesh, blocks=model.blocks)   # in place of fully_shard",
                ],
            )
        )


def _draw(out: Tensor, stream: str, placement: Placement, mesh: MoEMesh, std: float) -> None:
    whole, place = whole_shape(placement, mesh, out), place_in_whole(placement, mesh, out)
    rows = local(out)
    if not whole:  # a single number is a row of one
        whole, place, rows = (1,), (0,), rows.reshape(1)
    for i, row in enumerate(rows):
        seed = hashlib.sha256(f"{stream}/{place[0] + i}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        drawn = torch.randn(whole[1:], generator=generator, dtype=torch.float32, device="cpu")
        drawn = drawn * std
        for dim, start in enumerate(place[1:]):
            drawn = drawn.narrow(dim, start, row.shape[dim])
        row.copy_(drawn)
