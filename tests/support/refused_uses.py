"""Dispatchers that do not fit a layer, and outputs that are used as tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from spmd_moe import (
    FixedCapacity,
    Local,
    MoE,
    MoEConfig,
    MoEMesh,
    R,
    RouterConfig,
    init_weights,
    watch_hangs,
)
from spmd_moe.core import check_gpu
from tests.support.pretended_device import on_device, pretended_device, to_device
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


def _on_gpus(check: Callable[[str, str], None], count: int, major: int = 9) -> object:
    """On a machine with two ranks, as many GPUs, and a torch for those from capability 7.5 on."""
    pretended: dict[str, object] = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "get_device_capability": lambda device=None: (major, 0),
        "get_arch_list": lambda: ["sm_75", "sm_90"],
    }
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(check_gpu, "_on_gpus", lambda device_type: True))
        patches.enter_context(mock.patch.dict("os.environ", {"LOCAL_WORLD_SIZE": "2"}))
        for name, value in pretended.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, value))
        check("MoEMesh.init", "cuda")
    return None


def _captured() -> object:
    router = RouterConfig(8, 2, jitter=0.1)
    layer = MoE(MoEConfig(4, 8, router), MoEMesh.single())
    with pretended_device() as log:
        to_device(layer)
        log.capturing = True
        return layer(on_device(X))


def _watched() -> None:
    with watch_hangs(seconds=0):
        raise AssertionError


BAD_USES: dict[str, Callable[[], object]] = {
    "local_with_sharded_experts": _local_on_two,
    "fixed_rows_to_count": _fixed_on_two,
    "output_as_tensor": lambda: X + _output(),
    "output_in_torch": lambda: torch.nn.Linear(4, 4)(_output()),
    "output_attribute": lambda: _output().sum(),
    "output_operator": lambda: _output() * 2,
    "router_captured": _captured,
    "mesh_no_gpu": lambda: _on_gpus(check_gpu.check_device_of_rank, 0),
    "mesh_few_gpus": lambda: _on_gpus(check_gpu.check_device_of_rank, 1),
    "mesh_old_gpus": lambda: _on_gpus(check_gpu.check_capability, 2, 7),
    "watch_seconds": _watched,
}
