"""Run a case of the layer on each rank, and compare all ranks with the oracle."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
import torch.distributed as dist
from spmd_types import MeshAxis, get_local_type
from torch import Tensor, nn

from spmd_moe.check.signatures import axis, checked, declare, signatures, what_ran
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DENSE, DP, EXPERT, TP, P, Placement, V, placements_of
from spmd_moe.layer.moe import MoE, MoEOutput
from tests.support import layer_oracle as oracle
from tests.support.dispatchers import make_dispatcher
from tests.support.layer_layouts import Case, gradient, meaning, part


def build(case: Case) -> MoE:
    """The layer of this rank, with its part of the case's weights."""
    lay, rank = case.layout, dist.get_rank()
    mesh = MoEMesh.init("cpu", dp=lay.dp, cp=lay.cp, tp=lay.tp, ep=lay.ep, etp=lay.etp)
    dispatcher = make_dispatcher(case.dispatcher, mesh, case.config.router.num_experts)
    layer = MoE(case.config, mesh, dispatcher).to(torch.float64)
    declared, state = placements(layer), layer.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, whole in case.weights().items():
            state[name].copy_(part(whole, declared[name], case.layout, rank))
    return layer


def placements(layer: nn.Module) -> dict[str, Placement]:
    """The declared placement of every parameter and buffer, by its full name."""
    return {
        f"{prefix}.{name}": placement
        for prefix, module in layer.named_modules()
        for name, placement in placements_of(type(module)).items()
    }


def run_rank(case: Case, typed: bool = False) -> dict[str, Tensor]:
    """What this rank gets: its output, its counts, and every gradient."""
    rank, layer = dist.get_rank(), build(case)
    x, mask, ids = case.x(rank).requires_grad_(), case.mask(rank), case.expert_ids(rank)
    more = {name: given.requires_grad_() for name, given in case.beside(rank).items()}
    out = (forward_typed if typed else forward)(case, layer, more, x, mask, ids)
    out.hidden.backward(case.upstream(rank).view_as(out.hidden))
    assert torch.equal(layer.router.seen_E, out.counts_E)
    leaves = [("x", x), *more.items(), *layer.named_parameters()]
    gradients = {name: leaf.grad for name, leaf in leaves}
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert found.keys() == gradients.keys(), f"no gradient for {gradients.keys() - found.keys()}"
    assert all(type(gradient) is Tensor for gradient in found.values()), "not yet waited for"
    return {"out": out.hidden.detach().clone(), "counts": out.counts_E, **found}


def run_typed(case: Case) -> dict[str, Tensor]:
    """As `run_rank`, on a process whose signatures are looked at for as long."""
    with signatures(["spmd_moe"]):
        return run_rank(case, typed=True)


def forward(
    case: Case, layer: MoE, more: dict[str, Tensor], x: Tensor, *masks: Tensor | None
) -> MoEOutput:
    return layer(x, *masks, **more)


def forward_typed(
    case: Case, layer: MoE, more: dict[str, Tensor], x: Tensor, *masks: Tensor | None
) -> MoEOutput:
    """The forward under the strict checker, every signature checked, and the output's type too."""
    declare_all(layer, (x, *masks, *more.values()))
    with checked(layer.mesh):
        out = forward(case, layer, more, x, *masks)
    assert {"Experts.forward", f"{type(layer.dispatcher).__name__}.combine"} <= what_ran()
    if case.layout.tp > 1:
        have = get_local_type(out.hidden)[MeshAxis.of(layer.mesh[TP].group)]
        assert have is (case.config.dst if case.whole_out else V), have
    return out


def wanted(case: Case) -> dict[str, Tensor]:
    """What one process computes: output, counts, gradients of the input and of every weight."""
    weights = {name: t.requires_grad_() for name, t in case.weights().items()}
    tokens = {
        name: torch.cat([case.rows(name, r) for r in range(case.layout.world)]).requires_grad_()
        for name in ("x", *case.more)
    }
    mask, ids = case.whole_mask(), case.whole_ids()
    y, counts = oracle.moe(tokens, weights, case.config, mask, ids)
    g = torch.cat([case.rows("g", r) for r in range(case.layout.world)])
    inputs = {**tokens, **weights}
    gradients = torch.autograd.grad(
        y, list(inputs.values()), g, allow_unused=True, materialize_grads=True
    )
    return {"out": y.detach(), "counts": counts, **dict(zip(inputs, gradients, strict=True))}


def compare(case: Case, by_rank: list[dict[str, Tensor]]) -> None:
    """Every rank's results against the oracle."""
    want = wanted(case)
    compare_rows(case, by_rank, want["out"], {name: want[name] for name in ("x", *case.more)})
    counts = sum((b["counts"] for b in by_rank), torch.zeros_like(want["counts"]))
    assert torch.equal(counts, want["counts"])
    declared = placements(MoE(case.config, MoEMesh.single()))
    # A router's gradient can be zero, as with one choice and route_norm: terms of this size cancel.
    terms = max((t.abs().max().item() for t in want.values() if t.numel()), default=1.0)
    for name in case.weights():
        if name != "router.bias_E":
            whole = meaning([b[name] for b in by_rank], gradient(declared[name]), case.layout)
            close(whole, want[name], f"gradient of {name}", terms)


def declare_all(layer: MoE, inputs: Iterable[Tensor | None]) -> None:
    """What a caller of the layer, and its classes, say of all that it is given and has."""
    name_axes(layer.mesh)
    for x in inputs:
        if x is not None:
            declare(x, Placement((DP[V], CP[V], TP[layer.config.src])), layer.mesh)
    declared = placements(layer)
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        declare(tensor, declared[name], layer.mesh)


def name_axes(mesh: MoEMesh) -> None:
    """Make every axis known to spmd_types, whose list of names must not grow while it is read."""
    with _NAMING:
        for role in (*DENSE, *EXPERT):
            axis(mesh, role)
    dist.barrier()


_NAMING = threading.Lock()


def compare_rows(
    case: Case, by_rank: list[dict[str, Tensor]], y: Tensor, wanted_grads: dict[str, Tensor]
) -> None:
    """What belongs to tokens: outputs, and gradients of inputs."""
    ends = torch.tensor(case.tokens).cumsum(0).tolist()
    for rank, got in enumerate(by_rank):
        cell = case.cell(rank)
        rows = slice(ends[cell[0]] - case.tokens[cell[0]], ends[cell[-1]])
        want_y = y[rows] if case.whole_out else case.out_rows(y[rows], rank)
        close(got["out"].flatten(0, -2), want_y, f"output of rank {rank}")
        for name, dx in wanted_grads.items():
            got_dx, want_dx = got[name], dx[rows]
            if not case.whole_in:
                want_dx = case.out_rows(want_dx, rank)
            if case.config.src.backward_type() is P:
                got_dx = sum((by_rank[other][name] for other in cell), torch.zeros_like(got_dx))
            close(got_dx.flatten(0, -2), want_dx, f"gradient of {name} of rank {rank}")


def close(got: Tensor, want: Tensor, what: str, terms: float = 1.0) -> None:
    """Equal up to rounding: relative to the largest number, or, for a sum whose terms cancel, to
    the size of the `terms`."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    if want.numel():
        off, largest = (got - want).abs().max().item(), want.abs().max().item()
        bound = max(1e-10 * min(largest, 1.0), 1e-15 * max(terms, 1.0))
        assert off < bound, f"{what} is off by {off:.3g}, of {largest:.3g}"
