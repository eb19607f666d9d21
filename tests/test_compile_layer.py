"""The whole layer compiled over ranks: the same values, and only the graph breaks listed here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spmd_moe import AllGather, MoE, MoEConfig, MoEMesh, RouterConfig, S, init_weights
from spmd_moe.placement import Kind, R
from tests.workers import run

# Where a graph ends, by the innermost function: the host reads how many rows will come, and
# spmd_types' declaration of a sum, which the compiler cannot look into while autograd is on.
BREAKS = {"host.host_ints", "_local.reinterpret"}


def layer(dp: int, tp: int, ep: int, etp: int, gather: bool, src: Kind) -> MoE:
    mesh = MoEMesh.init("cpu", dp=dp, tp=tp, ep=ep, etp=etp)
    router = RouterConfig(8, 2, dtype=torch.float64)
    config = MoEConfig(16, 32, router, src=src, dst=src)
    made = MoE(config, mesh, AllGather(mesh, 8) if gather else None).to(torch.float64)
    init_weights(made, mesh, seed=0, std=0.3)
    return made


def results(made: MoE, call: Any) -> list[Tensor]:
    made.zero_grad()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = call(x.requires_grad_())
    out.hidden.square().sum().backward()
    gradients = [leaf.grad for leaf in (x, *made.parameters())]
    return [out.hidden.detach().clone(), out.counts_E, *(g for g in gradients if g is not None)]


def compiled(*how: Any) -> tuple[set[str], float, int]:
    """Where graphs end, how far results are from eager ones, and how many results there are."""
    warnings.simplefilter("ignore")  # the compiler's own, of tensors that are not leaves
    made = layer(*how)
    eager = results(made, made)
    graphs = results(made, torch.compile(made, backend="aot_eager"))
    torch._dynamo.reset()
    explained = torch._dynamo.explain(made)(torch.randn(5, 16, dtype=torch.float64))
    places = [reason.user_stack[-1] for reason in explained.break_reasons]
    off = max(float((a - b).abs().max()) for a, b in zip(eager, graphs, strict=True))
    alive = sum(bool(a.any()) for a in eager)
    return {f"{Path(p.filename).stem}.{p.name}" for p in places}, off, alive


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        (1, 2, 2, 1, False, R),
        (2, 1, 2, 1, True, S(0)),
    ],
    ids=["exchange", "gather"],
)
def test_the_layer_runs_compiled_and_breaks_only_where_sizes_are_read(how: tuple[Any, ...]) -> None:
    for places, off, alive in run(2, compiled, *how, timeout=300.0):
        assert places and places <= BREAKS
        assert off < 1e-12 and alive == 7
