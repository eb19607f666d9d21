"""The plan's collectives are those that a traced run issues: each one, in order, to the byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from spmd_moe import (
    ConfigError,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    ScoreApplication,
    SharedConfig,
    init_weights,
)
from spmd_moe.check import Case, Layout
from spmd_moe.check.forecast import forecast, group
from spmd_moe.check.mirror_world import Issued
from spmd_moe.check.signatures import signatures
from spmd_moe.check.trace import Configuration, Trace, standing, trace
from spmd_moe.core.placement import CP, DENSE, DP, EXPERT, TP, I, Placement, R, S, V
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.activations import SQUARED_RELU
from spmd_moe.layer.boundary import INSIDE
from spmd_moe.layer.dispatch.forecast import Collective
from spmd_moe.layer.router import first_in_turn
from tests.support.dispatchers import DISPATCHERS, SHARDED
from tests.support.simulated_ranks import fake_world

PLAIN = MoEConfig(16, 24, RouterConfig(12, 2, force_balance=True))
CONFIGS = {
    "plain": PLAIN,
    "whole": dataclasses.replace(PLAIN, src=R, dst=I, balance="batch"),
    "gathered": dataclasses.replace(PLAIN, dst=R, shared=SharedConfig(24, gated=True)),
    "invariant": dataclasses.replace(
        PLAIN, src=I, dst=R, shared=SharedConfig(24, gated=True, sharded=True)
    ),
    "late": dataclasses.replace(
        PLAIN, score_application=ScoreApplication.IN_COMBINE, activation=SQUARED_RELU
    ),
    "not gated": dataclasses.replace(
        PLAIN,
        activation=SQUARED_RELU,
        shared=SharedConfig(24),
        router=RouterConfig(12, 3, force_balance=True),
    ),
    "router input": dataclasses.replace(
        PLAIN, src=I, dst=I, router=RouterConfig(12, 2, force_balance=True, input_dim=8)
    ),
    "given": dataclasses.replace(PLAIN, src=I, dst=I, router=RouterConfig(12, 2, given=True)),
}
LAYOUTS = [Layout(dp=2, tp=4, ep=2, etp=2), Layout(cp=2, tp=3, ep=3)]
BESIDE = ("router input", "given")  # inputs of the router: alike on each layout and dispatcher
CASES = [(name, LAYOUTS[0], torch.float32) for name in CONFIGS if name not in BESIDE]
CASES += [(name, LAYOUTS[1], torch.float32) for name in ("plain", "invariant", "late")]
CASES += [("whole", Layout(), torch.float32)]
# bfloat16, in which sums are wider than what travels, on the layout that has every collective.
CASES += [(name, LAYOUTS[0], torch.bfloat16) for name in ("whole", "invariant")]
ALL = [(*case, dispatcher) for case in CASES for dispatcher in SHARDED]
ALL += [(name, LAYOUTS[0], torch.float32, SHARDED[0]) for name in BESIDE]


@pytest.fixture(scope="module", autouse=True)
def _signatures_are_read() -> Iterator[None]:
    with signatures({"spmd_moe"}):
        yield


@final
class WithInputs(nn.Module):
    """A layer that is called with what its router reads: an input, or ids and weights."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, first: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return self.layer(x, router_input=first).hidden
        return self.layer(x, None, first, expert_weights=weights).hidden


def inputs(config: MoEConfig, rank: int, world: int, rows: int, before: int) -> list[Tensor]:
    """What goes with the tokens; ids in turn, as a forecast assumes them for the rank's own."""
    router = config.router
    if router.input_dim is not None:
        return [torch.randn(rows, router.input_dim, requires_grad=True)]
    if not router.given:
        return []
    slots = torch.arange(rows * router.top_k).view(rows, router.top_k) - before * router.top_k
    first = first_in_turn(rank, world, router.num_experts)
    weights = torch.rand(rows, router.top_k, requires_grad=True)
    return [(slots + first) % router.num_experts, weights]


def traced(
    config: MoEConfig, dispatcher: Any, configuration: Configuration, dtype: torch.dtype
) -> tuple[Trace, list[Collective]]:
    """A run in which all ranks are like this one, and the plan of such a world."""
    planned: list[Collective] = []
    layout, rank = configuration.layout, configuration.rank

    def target(mesh: MoEMesh, tokens: int) -> Case:
        layer = MoE(config, mesh, dispatcher(mesh, config.router.num_experts))
        init_weights(layer, mesh, seed=0)
        tp = mesh[TP]
        mine = ShardShape.even(tokens, tp.size).sizes[tp.rank]
        rows = mine if config.src == INSIDE else tokens
        x = torch.randn(rows, config.dim, dtype=dtype, requires_grad=True)
        foreseen = forecast(layer.to(dtype), layout, rank, [mine] * layout.world, dtype)
        assert foreseen is not None
        planned.extend(foreseen)
        kind = S(0) if config.src == INSIDE else config.src
        before = sum(ShardShape.even(tokens, tp.size).sizes[: tp.rank])
        args = (x, *inputs(config, rank, layout.world, rows, before))
        module = WithInputs(layer) if len(args) > 1 else layer
        return Case(module, args, (Placement((DP[V], CP[V], TP[kind])),) * len(args))

    with standing(configuration.layout, configuration.rank) as here:
        return trace(target, configuration, {"spmd_moe"}, here), planned


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The plan of a world in which all ranks are like one, and so begin with its expert too."""

    def like(rank: int) -> None:
        def first(place: int, places: int, num_experts: int) -> int:
            return first_in_turn(rank, places, num_experts)

        monkeypatch.setattr("spmd_moe.check.forecast.first_in_turn", first)

    return like


def said(layout: Layout, rank: int, when: str, issued: Issued) -> tuple[Any, ...]:
    roles = [r for r in (*DENSE, *EXPERT) if tuple(group(layout, rank, r)) == issued.group]
    return when, issued.op, roles, issued.shape, issued.dtype


def host_counts(config: MoEConfig, layout: Layout) -> bool:
    """Ranks of tp must tell each other how many tokens they have; with fixed shapes none can."""
    sharded = config.shared is not None and config.shared.sharded
    return layout.tp > 1 and config.src == INSIDE and (config.dst != INSIDE or sharded)


@pytest.mark.parametrize(("config", "layout", "dtype", "dispatcher"), ALL, ids=str)
def test_the_forecast_is_what_happens(
    config: str,
    layout: Layout,
    dtype: torch.dtype,
    dispatcher: str,
    mirrors: Callable[[int], None],
) -> None:
    # All ranks have what this one has; a whole on tp is therefore one that divides.
    if dispatcher == "fixed" and host_counts(CONFIGS[config], layout):
        with (
            pytest.raises(ConfigError, match="such ranks tell each other"),
            fake_world(layout.world),
        ):
            mesh = layout.mesh()
            MoE(CONFIGS[config], mesh, DISPATCHERS[dispatcher](mesh, 12))
        return
    some = [(6 * layout.tp, 0), (layout.tp, layout.world - 1), (0, 0)]
    if CONFIGS[config].src == INSIDE:
        some += [(5, layout.world - 1), (1, 0)]
    for tokens, rank in some:
        mirrors(rank)
        run, planned = traced(
            CONFIGS[config], DISPATCHERS[dispatcher], Configuration(layout, tokens, rank), dtype
        )
        assert [str(f) for f in run.findings] == []
        happened = [said(layout, rank, "forward", i) for i in run.forward]
        happened += [said(layout, rank, "backward", i) for i in run.backward]
        foreseen = [(c.when, c.op, c.role, c.shape, c.dtype) for c in planned]
        assert len(happened) == len(foreseen)
        for (when, op, roles, *rest), (when_, op_, role, *rest_) in zip(
            happened, foreseen, strict=True
        ):
            assert (when, op, rest) == (when_, op_, rest_) and role in roles
        assert bool(happened) == (layout.world > 1)
