"""The whole layer compiled over ranks: the same values, and only the graph breaks listed here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spmd_moe import (
    AllGather,
    FixedCapacity,
    MoE,
    MoEConfig,
    MoEMesh,
    MoEOutput,
    R,
    RouterConfig,
    SharedConfig,
    balance_loss,
    init_weights,
    reduce_loss_terms,
    z_loss,
)
from tests.support.workers import run

CONFIG = MoEConfig(16, 32, RouterConfig(8, 2, dtype=torch.float64))


@dataclass(frozen=True)
class Case:
    """A layer on two ranks, and with what it is called."""

    degrees: dict[str, int]
    config: MoEConfig
    breaks: set[str]  # by the innermost function
    dispatcher: Callable[[MoEMesh], Any] | None = None
    masked: bool = False
    ids: bool = False
    lengths: tuple[int, ...] = (3, 5)  # the second time sizes become variables

    def layer(self) -> MoE:
        mesh = MoEMesh.init("cpu", **self.degrees)
        made = MoE(self.config, mesh, self.dispatcher and self.dispatcher(mesh))
        made = made.to(torch.float64)
        init_weights(made, mesh, seed=0, std=0.3)
        return made

    def given(self, length: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Two sequences of this length, their mask, and ids of their choices."""
        drawn = torch.Generator().manual_seed(length)
        x = torch.randn(2, length, 16, generator=drawn, dtype=torch.float64)
        mask = torch.rand(2, length, generator=drawn) < 0.7 if self.masked else None
        ids = torch.randint(-1, 8, (2, length, 2), generator=drawn) if self.ids else None
        return x.requires_grad_(), mask, ids


def by_gather(mesh: MoEMesh) -> AllGather:
    return AllGather(mesh, 8)


def in_buffers(mesh: MoEMesh) -> FixedCapacity:
    return FixedCapacity(mesh, 8, rows_per_rank=5)


SIZES = {"host_values.read_ints"}  # how many rows will come
CASES = {
    # all that a layer can have, on tokens that tp shares out
    "exchange": Case(
        {"tp": 2, "ep": 2},
        replace(
            CONFIG,
            src=R,
            dst=R,
            shared=SharedConfig(8, gated=True, sharded=True),
            balance="sequence",
        ),
        SIZES,
        masked=True,
    ),
    "gather": Case(
        {"dp": 2, "ep": 2},
        replace(CONFIG, shared=SharedConfig(8), balance="batch"),
        SIZES,
        by_gather,
        ids=True,
        lengths=(5,),
    ),
    "tokens of two ranks": Case({"tp": 2}, replace(CONFIG, dst=R), SIZES, lengths=(3, 5, 1)),
    "fixed shapes": Case({"dp": 2, "ep": 2}, CONFIG, set(), in_buffers, lengths=(3, 5, 1)),
}


def results(made: MoE, call: Any, given: tuple[Tensor, Tensor | None, Tensor | None]) -> list[Any]:
    """All that comes out, all gradients, and the counter."""
    made.zero_grad()
    made.router.seen_E.zero_()
    given[0].grad = None
    out: MoEOutput = call(*given)
    loss, terms = out.hidden.square().sum(), out.losses
    found = [out.hidden, out.counts_E, out.dropped]
    if terms is not None:
        total = reduce_loss_terms(terms, made.mesh)
        loss = loss + balance_loss(terms, total, made.mesh) + z_loss(terms, total)
        found += [terms.prob_sums_BE, terms.z_sum]
    loss.backward()
    found += [leaf.grad for leaf in (given[0], *made.parameters()) if leaf.grad is not None]
    return [x.detach().clone() for x in (*found, made.router.seen_E)]


def compiled(name: str) -> tuple[set[str], float, int, int]:
    """Where graphs end, how far results are from eager ones, how many results there are and how
    many of them are not zeros."""
    warnings.simplefilter("ignore")  # the compiler's own, of tensors that are not leaves
    case = CASES[name]
    made, off, alive, there = case.layer(), 0.0, 0, 0
    graphs = torch.compile(made, backend="aot_eager")
    for length in case.lengths:
        given = case.given(length)
        eager, others = results(made, made, given), results(made, graphs, given)
        off = max([off, *(float((a - b).abs().max()) for a, b in zip(eager, others, strict=True))])
        there, alive = there + len(eager), alive + sum(bool(a.any()) for a in eager)
    torch._dynamo.reset()
    reasons = torch._dynamo.explain(made)(*case.given(3)).break_reasons
    places = [reason.user_stack[-1] for reason in reasons]
    return {f"{Path(p.filename).stem}.{p.name}" for p in places}, off, there, alive


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "exchange",
        "fixed shapes",
        pytest.param("gather", marks=pytest.mark.long),
        pytest.param("tokens of two ranks", marks=pytest.mark.long),
    ],
)
def test_the_layer_runs_compiled_and_breaks_only_where_sizes_are_read(name: str) -> None:
    for places, off, there, alive in run(2, compiled, name, timeout=300.0):
        assert places == CASES[name].breaks
        assert off < 1e-12 and alive > 0.7 * there, (off, alive, there)
