"""Activation checkpointing, alone and under FSDP2: the same bits, with less kept or sent."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from spmd_moe import (
    CLAMPED_SWIGLU,
    GELU,
    SWIGLU,
    Activation,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    SharedConfig,
    init_weights,
    parallelize,
    recompute,
)
from tests.support.layer_layouts import Layout
from tests.support.models import Model, batch, build, mesh_of
from tests.support.operator_log import operators
from tests.support.workers import run

LAYOUT = Layout(dp=2, tp=2, ep=2, etp=2)


@dataclass(frozen=True)
class Result:
    """Of one rank: loss, gradients and counters; what was sent; bytes that waited for backward."""

    tensors: dict[str, Tensor]
    sent: Counter[str]
    saved: int


def step(model: Model, mesh: MoEMesh) -> Result:
    """Forward and backward."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if type(x) is Tensor:  # what is still under way has no memory that could be asked
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    words, target = batch(mesh, True)
    with operators() as ran:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(words, target)
        loss.backward()
    found = {"loss": loss.detach(), **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad
        found[name] = grad.to_local() if isinstance(grad, DTensor) else grad
    moves = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter")
    sent = Counter(op.name for op in ran if "_c10d_functional" in op.name)
    sent = Counter({name: n for name, n in sent.items() if any(move in name for move in moves)})
    return Result({n: t.clone() for n, t in found.items()}, sent, sum(kept.values()))


def on_rank(exchanges: bool | None, fsdp: bool) -> Result:
    mesh = mesh_of(LAYOUT)
    model = build(mesh, True)
    if exchanges is not None:
        recompute(model.blocks, exchanges=exchanges)
    if fsdp:
        parallelize(model, mesh, blocks=model.blocks)
    return step(model, mesh)


@pytest.mark.gloo
@pytest.mark.parametrize("fsdp", [False, True])
def test_the_same_bits_and_what_is_sent(fsdp: bool) -> None:
    plain = run(4, on_rank, None, fsdp)
    for exchanges in (False, True):
        for before, after in zip(plain, run(4, on_rank, exchanges, fsdp), strict=True):
            assert before.tensors.keys() == after.tensors.keys()
            for name, tensor in before.tensors.items():
                assert torch.equal(tensor, after.tensors[name]), name
            assert sum(before.sent.values()) > 20
            assert (after.sent == before.sent) == (not exchanges), after.sent


def test_less_waits_for_backward() -> None:
    saved = {}
    for exchanges in (None, False, True):
        model = build(mesh := MoEMesh.single(), True)
        if exchanges is not None:
            recompute(model.blocks, exchanges=exchanges)
        saved[exchanges] = step(model, mesh).saved
    assert saved[True] <= saved[False] < 0.6 * saved[None], saved


@pytest.mark.parametrize("exchanges", [False, True])
def test_experts_are_chosen_once(exchanges: bool) -> None:
    """Choices made again could be others, and rows would then not be where they were sent."""
    model = build(mesh := MoEMesh.single(), True)
    recompute(model.blocks, exchanges=exchanges)
    with operators() as ran:
        model(*batch(mesh, True)).backward()
    times = [op.name for op in ran].count("aten::topk")
    assert times == len(list(model.blocks)) * (2 if exchanges else 1)


def all_gradients(layer: MoE, kept: Callable[[str], bool] | None) -> list[Tensor]:
    """Those of a step in which a checkpoint keeps the results of some operators."""
    layer.zero_grad()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])

    def policy(
        _: object, operator: OpOverload, *args: object, **kwargs: object
    ) -> CheckpointPolicy:
        keep = kept is not None and kept(operator.name())
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    how: dict[str, Any] = {} if kept is None else {"context_fn": contexts}
    out = checkpoint(layer, x, mask, use_reentrant=False, **how)
    (
        out.hidden.square().sum() + out.losses.z_sum + out.losses.prob_sums_BE.square().sum()
    ).backward()
    return [leaf.grad for leaf in (x, *layer.parameters()) if leaf.grad is not None]


@pytest.mark.parametrize("activation", [SWIGLU, CLAMPED_SWIGLU, GELU], ids=lambda a: a.name)
def test_a_checkpoint_may_keep_what_it_likes(activation: Activation) -> None:
    """Each operator's result alone, and all but it; torch refuses one that was written to since."""
    router = RouterConfig(8, 2, num_expert_groups=4, num_limited_groups=2, route_norm=True)
    shared = SharedConfig(8, gated=True)
    config = MoEConfig(16, 8, router, activation, bias=True, shared=shared, balance="sequence")
    layer = MoE(config, mesh := MoEMesh.single())
    init_weights(layer, mesh, seed=0, std=0.5)
    with operators() as ran:
        plain = all_gradients(layer, None)
    assert len(plain) == 1 + len(list(layer.parameters())) and all(g.any() for g in plain)
    names = {operator.name for operator in ran}
    assert len(names) > 30
    for name in names:
        for kept in (name.__eq__, name.__ne__):
            pairs = zip(plain, all_gradients(layer, kept), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), name


def test_a_copy_runs_its_own_weights() -> None:
    first = build(mesh := MoEMesh.single(), True)
    recompute(first.blocks)
    copied = copy.deepcopy(first)
    with torch.no_grad():
        copied.get_parameter("blocks.0.moe.experts.w1_eFD").mul_(2)
    theirs, ours = (model(*batch(mesh, True)) for model in (first, copied))
    assert not torch.equal(theirs, ours)
    ours.backward()
    assert all(p.grad is not None for p in copied.blocks.parameters())
    assert all(p.grad is None for p in first.parameters())


# --- compiled -----------------------------------------------------------------------------------


def compiled(what: str, exchanges: bool | None) -> tuple[dict[str, Tensor], int]:
    """Loss, gradients and counters under FSDP2, and how many graphs were compiled."""
    warnings.simplefilter("ignore")  # the compiler's own, of tensors that are not leaves
    torch._dynamo.reset()
    counters.clear()
    mesh = mesh_of(Layout(dp=2, ep=2))
    model = build(mesh, True)
    if exchanges is not None:
        recompute(model.blocks, exchanges=exchanges)
    for module in model.modules():
        if type(module).__name__ in what.split():
            module.compile(backend="aot_eager")
    parallelize(model, mesh, blocks=model.blocks)
    loss = model(*batch(mesh, True))
    loss.backward()
    found = {"loss": loss.detach(), **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad.to_local().clone()
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.long
@pytest.mark.gloo
def test_compiled_too() -> None:
    """Whole blocks; or, where they are recomputed, the parts without an exchange."""
    plain = run(2, compiled, "", None)
    for what, exchanges in (("Block", None), ("Router Experts", False), ("Router Experts", True)):
        for (before, none), (after, graphs) in zip(
            plain, run(2, compiled, what, exchanges, timeout=150), strict=True
        ):
            assert none == 0 < graphs
            for name, tensor in before.items():
                assert torch.allclose(tensor, after[name], rtol=1e-12, atol=1e-15), name
