"""CUDA graphs: no step with fixed shapes does what capture forbids, on a simulated device.

Capture forbids reads by the host, uploads of memory that is not pinned, sizes that depend on data,
and random numbers of a generator that is not registered with the graph.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import train_model
from torch import nn

from spmd_moe import (
    EP,
    FixedCapacity,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    ScoreApplication,
    SharedConfig,
    expert_load,
    init_weights,
)
from tests.support.pretended_device import on_device, pretended_device, to_device, values
from tests.support.workers import run

CONFIG = MoEConfig(64, 32, RouterConfig(8, top_k=2), src=I, dst=I)
RICH = replace(
    CONFIG,
    router=RouterConfig(8, top_k=2, score_func="sigmoid", route_norm=True, bias=True),
    bias=True,
    shared=SharedConfig(32, gated=True),
    score_application=ScoreApplication.IN_COMBINE,
)
DEGREES = [{"dp": 4, "ep": 4}, {"tp": 4, "ep": 2, "etp": 2}, {"dp": 2, "tp": 2, "ep": 4}]
CONFIGS = {"plain": CONFIG, "rich": RICH}


def forbidden(
    mesh: MoEMesh, name: str, dtype: torch.dtype, capability: tuple[int, int], trains: bool
) -> list[str]:
    """What a call does that cannot be captured, with its line; and backward, if it trains."""
    layer = MoE(CONFIGS[name], mesh, FixedCapacity(mesh, 8, rows_per_rank=12))
    init_weights(layer, mesh, seed=0)
    layer.to(dtype).train(trains)
    with pretended_device(capability) as log, torch.set_grad_enabled(trains):
        to_device(layer)
        x = on_device(torch.randn(6, 64).to(dtype), requires_grad=trains)
        mask = on_device(torch.tensor([True, True, False, True, True, False]))
        ids = on_device(torch.randint(0, 8, (6, 2)))
        log.capturing = True
        for given in ((), (mask,), (mask, ids), (None, ids)):
            out = layer(x, *given)
            expert_load(out, mesh)
            if trains:
                torch.autograd.backward(out.hidden.float().sum())
        assert values(out.hidden).isfinite().all() and log.operators
        return log.take()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_process(
    name: str, dtype: torch.dtype, capability: tuple[int, int], trains: bool
) -> None:
    assert forbidden(MoEMesh.single(), name, dtype, capability, trains) == []


def over_ranks(degrees: dict[str, int]) -> list[str]:
    mesh = MoEMesh.init("cpu", **degrees)
    each = (forbidden(mesh, name, torch.bfloat16, (9, 0), True) for name in CONFIGS)
    return [wait for waits in each for wait in waits]


@pytest.mark.gloo
@pytest.mark.parametrize(
    "degrees",
    [{"dp": 4, "ep": 4}, {"tp": 4, "ep": 2, "etp": 2}, {"dp": 2, "tp": 2, "ep": 4}],
    ids=str,
)
def test_over_ranks(degrees: dict[str, int]) -> None:
    assert run(4, over_ranks, degrees) == [[]] * 4


def model_step(degrees: dict[str, int]) -> list[str]:
    """The example's model over bytes that are there, with dispatchers of fixed shapes."""
    mesh = MoEMesh.init("cpu", **degrees)
    model = train_model.build(
        mesh, width=32, hidden=32, layers=2, heads=2, length=8, experts=8, top_k=2, seed=0
    )
    for block in model.modules():
        if isinstance(block, train_model.Block):
            config = block.moe.config
            fixed = MoE(config, mesh, FixedCapacity(mesh, 8, rows_per_rank=64))
            fixed.load_state_dict(block.moe.state_dict())
            block.moe = fixed
    with pretended_device() as log, torch.no_grad():
        to_device(model.eval())
        bytes_BL = on_device(torch.randint(256, (2, 8)))
        log.capturing = True
        loss, _, _ = model(bytes_BL, bytes_BL, 16)
        assert values(loss).isfinite() and mesh[EP].size == degrees.get("ep", 1)
        return log.take()


@pytest.mark.gloo
@pytest.mark.parametrize("degrees", [{"dp": 2, "ep": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_a_step_of_the_example_model(degrees: dict[str, int]) -> None:
    assert run(2, model_step, degrees) == [[]] * 2


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(x).uniform_(generator=torch.Generator().manual_seed(1))
        return x * noise + torch.ones(3).to(x.device) + x.nonzero().shape[0]


def test_what_is_forbidden_is_seen() -> None:
    """So the tests above can fail."""
    with pretended_device() as log:
        Draws()(on_device(torch.ones(3)))
        kinds = [wait.partition(" ")[0] for wait in log.take()]
    assert kinds == ["draw", "upload", "read"]
    assert not dist.is_initialized()
