"""Input that one rank refuses, in cases in which the layer does not inform the others."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from spmd_moe import (
    FixedCapacity,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    S,
    balance_loss,
    init_weights,
    parallelize,
    reduce_loss_terms,
    watch_hangs,
)

ROUTER = RouterConfig(4, 2)
Inputs = Callable[[bool], Tensor]  # of a rank; True: of the one that gets it wrong
Made = tuple[nn.Module, Inputs]


def fixed_capacity() -> Made:
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    layer = MoE(MoEConfig(8, 16, ROUTER), mesh, FixedCapacity(mesh, 4, 16))
    init_weights(layer, mesh, seed=0)
    return layer, lambda wrong: torch.ones(4, 9 if wrong else 8)


def compiled_local() -> Made:
    warnings.simplefilter("ignore")  # Dynamo's own, which are errors in the workers of tests
    mesh = MoEMesh.init("cpu", tp=2)
    layer = MoE(MoEConfig(8, 16, ROUTER, src=S(0), dst=S(0)), mesh)
    init_weights(layer, mesh, seed=0)
    compiled: nn.Module = torch.compile(layer, backend="eager")  # type: ignore[assignment]  # a module is one
    return compiled, lambda wrong: torch.ones(4, 9 if wrong else 8)


def sequences() -> Made:
    mesh = MoEMesh.init("cpu", cp=2)
    layer = MoE(MoEConfig(8, 16, ROUTER, balance="sequence"), mesh)
    init_weights(layer, mesh, seed=0)

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            terms = layer(x).losses
            assert terms is not None
            return balance_loss(terms, reduce_loss_terms(terms, mesh), mesh)

    return Losses(), lambda wrong: torch.ones(3 if wrong else 2, 4, 8)


def fsdp_casts() -> Made:
    mesh = MoEMesh.init("cpu", dp=2)
    layer = MoE(MoEConfig(8, 16, ROUTER), mesh)
    init_weights(layer, mesh, seed=0)
    parallelize(layer, mesh, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return layer, lambda wrong: torch.ones(4, 8, dtype=torch.int64 if wrong else torch.float32)


MADE = {make.__name__: make for make in (fixed_capacity, compiled_local, sequences, fsdp_casts)}


def train(name: str, seconds: float, stays: float) -> str:
    """What a rank raises. Rank 1 gets it wrong, and its process goes on for so many seconds."""
    layer, inputs = MADE[name]()
    try:
        with watch_hangs(seconds=seconds, first_seconds=30) as watch:
            for wrong in (False, dist.get_rank() == 1):
                out = layer(inputs(wrong))
                loss = (out if isinstance(out, Tensor) else out.hidden).sum()
                loss.backward()
                dist.all_reduce(loss.detach())
                watch.step()
    except Exception as error:
        if dist.get_rank() == 1:
            time.sleep(stays)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "done"
