"""Run a case of the layer on real ranks or on simulated ones, and compare with the oracle."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from spmd_moe.dispatch import AllGather, AllToAll
from spmd_moe.mesh import MoEMesh
from spmd_moe.moe import MoE
from spmd_types import MeshAxis, get_local_type
from spmd_moe.placement import CP, DP, TP, Placement, V, placements_of
from tests.typed import checked, declare
from tests import oracle
from tests.layouts import Case, gradient, meaning, part
from tests.simulate import simulated

DISPATCHERS = {"": lambda mesh, e: None, "all_to_all": AllToAll, "all_gather": AllGather}


def build(case: Case) -> MoE:
    lay = case.layout
    mesh = MoEMesh.init("cpu", dp=lay.dp, cp=lay.cp, tp=lay.tp, ep=lay.ep, etp=lay.etp)
    dispatcher = DISPATCHERS[case.dispatcher](mesh, case.config.router.num_experts)
    return MoE(case.config, mesh, dispatcher).to(torch.float64)


def placements(layer: nn.Module) -> dict[str, Placement]:
    """The declared placement of every parameter and buffer, by its full name."""
    found = {}
    for prefix, module in layer.named_modules():
        for name, placement in placements_of(type(module)).items():
            found[f"{prefix}.{name}" if prefix else name] = placement
    return found


def run_rank(case: Case, typed: bool = False) -> dict[str, Tensor]:
    """What one real rank gets: its output, counts, and every gradient."""
    rank = dist.get_rank()
    layer = build(case)
    declared = placements(layer)
    with torch.no_grad():
        for name, whole in case.weights().items():
            layer.get_parameter(name) if name != "router.bias_E" else None
            target = layer.state_dict(keep_vars=True)[name]
            target.copy_(part(whole, declared[name], case.layout, rank))
    x = case.x(rank).requires_grad_()
    if typed:
        kind = case.config.src
        declare(x, Placement((DP[V], CP[V], TP[kind])), layer.mesh)
        for name, t in [*layer.named_parameters(), *layer.named_buffers()]:
            declare(t, declared[name], layer.mesh)
        with checked(layer.mesh) as ran:
            out = layer(x)
        kinds = get_local_type(out.hidden)
        want = case.config.dst if case.whole_out else V
        if case.layout.tp > 1:
            assert kinds[MeshAxis.of(layer.mesh[TP].group)] is want, kinds
        assert ran
    else:
        out = layer(x)
    out.hidden.backward(case.upstream(rank).view_as(out.hidden))
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values()) and x.grad is not None
    assert torch.equal(layer.router.seen_E, out.counts_E)
    return {"out": out.hidden.detach(), "x": x.grad, "counts": out.counts_E} | grads


def run_simulated(case: Case) -> list[dict[str, Tensor]]:
    """The same for all ranks, in one process."""
    with simulated(case.layout.world) as mode:
        with mode.disable():
            layer = build(case)
        declared = placements(layer)

        def every_rank(make: Any) -> Tensor:
            return mode.rank_map(make)

        named = {
            name: every_rank(lambda r, n=name, w=whole: part(w, declared[n], case.layout, r))
            for name, whole in case.weights().items()
        }
        for name in layer.state_dict():
            if name.endswith("seen_E"):
                named[name] = every_rank(
                    lambda r: torch.zeros(case.config.router.num_experts, dtype=torch.int64)
                )
        for name, tensor in named.items():
            if tensor.is_floating_point() and not name.endswith("bias_E"):
                tensor.requires_grad_()
        x = every_rank(case.x).requires_grad_()
        out = functional_call(layer, named, (x,))
        out.hidden.backward(every_rank(lambda r: case.upstream(r)).view_as(out.hidden))
        results = {"out": out.hidden.detach(), "x": x.grad, "counts": out.counts_E}
        results |= {name: t.grad for name, t in named.items() if t.requires_grad}
        return [
            {name: t._local_tensors[r] for name, t in results.items()}
            for r in range(case.layout.world)
        ]


def compare(case: Case, by_rank: list[dict[str, Tensor]], declared: dict[str, Placement]) -> None:
    """Every rank's results against the oracle of all tokens."""
    world, tp = case.layout.world, case.layout.tp
    w = {name: t.requires_grad_() for name, t in case.weights().items()}
    rename = {
        "shared.w1_fD": "shared.w1_FD",
        "shared.w3_fD": "shared.w3_FD",
        "shared.w2_Df": "shared.w2_DF",
    }
    seen = {rename.get(name, name): t for name, t in w.items()}
    x = torch.cat([case.rows("x", r) for r in range(world)]).requires_grad_()
    y, counts = oracle.moe(x, seen, case.config.router)
    y.backward(torch.cat([case.rows("g", r) for r in range(world)]))
    ends = torch.tensor(case.tokens).cumsum(0).tolist()
    for r in range(world):
        cell = case.cell(r)
        lo, hi = ends[cell[0]] - case.tokens[cell[0]], ends[cell[-1]]
        y_cell, dx_cell = y[lo:hi].detach(), x.grad[lo:hi]
        want = y_cell if case.whole_out else case.out_rows(y_cell, r)
        close(by_rank[r]["out"].flatten(0, -2), want, f"output of rank {r}")
        got_dx = [by_rank[q]["x"].flatten(0, -2) for q in cell]
        if not case.whole_in:
            close(by_rank[r]["x"].flatten(0, -2), case.out_rows(dx_cell, r), f"dx of rank {r}")
        else:
            kind = case.config.src.backward_type()
            close(
                sum(got_dx) if kind.value == "P" else by_rank[r]["x"].flatten(0, -2),
                dx_cell,
                f"dx of rank {r}",
            )
    assert torch.equal(sum(b["counts"] for b in by_rank), counts)
    for name, t in w.items():
        if name == "router.bias_E":
            continue
        got = meaning([b[name] for b in by_rank], gradient(declared[name]), case.layout)
        close(got, t.grad if t.grad is not None else torch.zeros_like(t), f"gradient of {name}")


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    if want.numel():
        off = (got - want).abs().max().item()
        assert off < 1e-10, f"{what} is off by {off:.3g}"
