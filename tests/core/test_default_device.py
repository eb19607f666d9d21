"""`torch.set_default_device`: what the host keeps stays on the host, and no rank waits for long."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spmd_moe import (
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    RoutingError,
    ShapeError,
    clip_grad_norm_,
    init_weights,
    load_checkpoint,
    reduce_gradients,
    sanitize,
    save_checkpoint,
    update_selection_bias,
)
from spmd_moe.core.host_values import draw_seed
from spmd_moe.core.torch_modes import is_unchecked
from spmd_moe.sanitize import tensor_digest
from tests.support.workers import run

CONFIG = MoEConfig(16, 8, RouterConfig(4, top_k=2, jitter=0.1), balance="batch")


def made(mesh: MoEMesh) -> MoE:
    layer = MoE(CONFIG, mesh)
    init_weights(layer, mesh, seed=0)
    return layer


def test_a_default_device_is_no_checker() -> None:
    with torch.device("meta"):
        assert is_unchecked()


def test_a_step_and_a_checkpoint_under_another_default_device() -> None:
    """Under "meta", where a tensor made by default has no values."""
    mesh, folder = MoEMesh.single(), Path(tempfile.mkdtemp())
    layer, again = made(mesh), made(mesh)
    want = [p.detach().clone() for p in layer.parameters()]
    x = torch.ones(3, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for cached in (tensor_digest._weights, tensor_digest._signs):
        cached.cache_clear()
    try:
        with torch.device("meta"), sanitize(layer, mesh, rate=1.0):
            init_weights(layer, mesh, seed=0)
            layer(x).hidden.sum().backward()
            reduce_gradients(layer, mesh)
            assert clip_grad_norm_(layer, mesh, 1.0).is_cpu
            optimizer.step()
            update_selection_bias([layer.router], mesh, 0.01)
            assert draw_seed() >= 0
            digests = tensor_digest.fingerprint(x), tensor_digest.sketch(x)
            save_checkpoint(folder / "a", layer, mesh)
            load_checkpoint(folder / "a", again, mesh)
        assert all(digest.is_cpu for digest in digests)
        for part in (layer, again):
            assert all(map(torch.equal, part.parameters(), want))
    finally:
        shutil.rmtree(folder)


def refused() -> str:
    """The last rank has its tokens on another device, and all have a default device."""
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    layer = made(mesh)
    x = torch.ones(3, 16, device="meta" if dist.get_rank() else "cpu")
    with torch.device("cpu"), pytest.raises((RoutingError, ShapeError)) as raised:
        layer(x)
    return f"{type(raised.value).__name__} {raised.value}".partition("\n")[0]


@pytest.mark.gloo
def test_a_refused_rank_tells_the_others() -> None:
    told, wrong = run(2, refused)
    assert told == "RoutingError MoE.forward: the input was refused on 1 of 2 ranks (etp 0 ep 1)."
    assert wrong == "ShapeError MoE.forward: x is on meta and the layer on cpu."
