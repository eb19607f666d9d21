"""Dispatchers that do not fit a layer, and outputs that are used as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spmd_moe import FixedCapacity, Local, MoE, MoEConfig, MoEMesh, R, RouterConfig, init_weights
from tests.support.simulated_ranks import fake_world

X = torch.ones(3, 4)


def _local_on_two() -> object:
    with fake_world(2):
        return Local(MoEMesh.init("cpu", tp=2, ep=2))


def _fixed_on_two() -> object:
    with fake_world(2):
        mesh = MoEMesh.init("cpu", tp=2, ep=2)
        return MoE(MoEConfig(4, 8, RouterConfig(8, 2), dst=R), mesh, FixedCapacity(mesh, 8, 2))


def _output() -> Any:
    layer = MoE(MoEConfig(4, 8, RouterConfig(8, 2)), MoEMesh.single())
    init_weights(layer, layer.mesh, seed=0)
    return layer(X)


BAD_USES: dict[str, Callable[[], object]] = {
    "local_with_sharded_experts": _local_on_two,
    "fixed_rows_to_count": _fixed_on_two,
    "output_as_tensor": lambda: X + _output(),
    "output_in_torch": lambda: torch.nn.Linear(4, 4)(_output()),
    "output_attribute": lambda: _output().sum(),
    "output_operator": lambda: _output() * 2,
}
