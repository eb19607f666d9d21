"""Waits of the host for a GPU: exact numbers on a pretended device, alone and over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from spmd_moe import (
    ExpertRecompute,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    S,
    SharedConfig,
    balance_loss,
    expert_load,
    init_weights,
    recompute,
    reduce_loss_terms,
    update_selection_bias,
    z_loss,
)
from tests.support.dispatchers import DISPATCHERS, SHARDED
from tests.support.pretended_device import on_device, pretended_device, to_device
from tests.support.workers import run

CONFIG = MoEConfig(64, 32, RouterConfig(8, top_k=2))
WAITS = {"local": 0, "all_to_all": 1, "dedup": 1, "all_gather": 1, "fixed": 0}


def waits(
    mesh: MoEMesh,
    name: str,
    config: MoEConfig = CONFIG,
    given: str = "",
    again: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> tuple[list[str], list[str], list[str]]:
    """The waits of a forward, of the losses of a step, and of backward."""
    layer = MoE(config, mesh, DISPATCHERS[name](mesh, 8))
    init_weights(layer, mesh, seed=0)
    layer.to(torch.bfloat16)
    if again:
        recompute([layer])
    with pretended_device(capability) as log:
        to_device(layer)
        x = on_device(torch.randn(6, 64).to(torch.bfloat16), requires_grad=True)
        mask = torch.tensor([True, True, False, True, True, False])
        ids = torch.randint(0, 8, (6, 2))
        out = layer(
            x,
            on_device(mask) if "mask" in given else None,
            on_device(ids) if "ids" in given else None,
        )
        forward, loss = log.take(), out.hidden.float().sum()
        if out.losses is not None:
            total = reduce_loss_terms(out.losses, mesh)
            loss = loss + balance_loss(out.losses, total, mesh) + z_loss(out.losses, total)
        expert_load(out, mesh)
        losses = log.take()
        torch.autograd.backward(loss)  # `loss.backward()` would hide what is recomputed
        backward = log.take()
        assert x.grad is not None and log.operators
        update_selection_bias([layer.router], mesh, 0.01)
        return forward, losses + log.take(), backward


@pytest.mark.parametrize("given", ["", "mask", "ids", "mask and ids"])
@pytest.mark.parametrize("name", DISPATCHERS)
def test_one_process(name: str, given: str) -> None:
    """One more for a mask or ids without any other, because sizes that are read say it too."""
    forward, losses, backward = waits(MoEMesh.single(), name, given=given)
    more = 1 if given and name == "local" else 0
    assert (len(forward), losses, backward) == (WAITS[name] + more, [], []), forward


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_recomputed_forward_reads_nothing_again(name: str) -> None:
    _, _, backward = waits(MoEMesh.single(), name, given="mask", again=True)
    assert backward == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_add_nothing(dtype: torch.dtype) -> None:
    config = MoEConfig(
        64,
        32,
        RouterConfig(8, top_k=2, dtype=torch.float32),
        bias=True,
        recompute=ExpertRecompute.FIRST_MATMULS,
        shared=SharedConfig(32, gated=True),
        balance="batch",
    )
    assert waits(MoEMesh.single(), "local", config) == ([], [], [])


def test_what_has_no_kernel_reads_its_counts_once() -> None:
    """On capability 8: one read in forward, for the loop over experts; none in backward."""
    forward, losses, backward = waits(MoEMesh.single(), "local", capability=(8, 0))
    assert (len(forward), losses, backward) == (1, [], [])
    assert "layer/grouped_matmul.py" in forward[0]


def over_ranks(tp: int, name: str) -> tuple[int, list[str], list[str]]:
    world = dist.get_world_size()
    mesh = MoEMesh.init("cpu", dp=world // tp, tp=tp, ep=world)
    kind = I if tp > 1 else S(0)
    config = MoEConfig(64, 32, RouterConfig(8, top_k=2), src=kind, dst=kind, balance="batch")
    forward, losses, backward = waits(mesh, name, config)
    return len(forward), losses, backward


@pytest.mark.gloo
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", SHARDED)
def test_over_ranks(name: str, tp: int) -> None:
    assert run(4, over_ranks, tp, name) == [(WAITS[name], [], [])] * 4


def test_a_new_wait_is_named_with_its_line() -> None:
    with pretended_device() as log:
        x = on_device(torch.ones(3))
        assert not log.take()
        x.sum().item()
        torch.ones(2).to(x.device)
        assert log.take() == ["read by item at the caller", "upload by _to_copy at the caller"]
