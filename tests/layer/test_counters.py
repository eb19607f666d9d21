"""What a layer remembers between steps: counts, and the selection bias."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE
from spmd_moe.layer.dispatch import AllToAll, Dispatcher, Local
from spmd_moe.layer.moe import MoE, MoEOutput
from spmd_moe.layer.moe_config import MoEConfig
from spmd_moe.layer.router import Router
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.layer.selection_bias import update_selection_bias
from spmd_moe.train.init_weights import init_weights
from tests.support.layer_layouts import Layout

# Shape letters in this file:
#   T  tokens    D  model width    E  experts    L  layers
CONFIG = MoEConfig(8, 12, RouterConfig(8, top_k=2, score_func="sigmoid"))
TOKENS = 11


def single(config: MoEConfig = CONFIG) -> MoE:
    mesh = MoEMesh.single()
    layer = MoE(config, mesh)
    init_weights(layer, mesh, seed=1, std=0.5)
    return layer


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((TOKENS, CONFIG.dim), generator=generator).requires_grad_()


def choices(layer: MoE, x_TD: Tensor) -> Tensor:
    """How often each expert is among the best two of a token, counted one by one."""
    counts_E = torch.zeros(CONFIG.router.num_experts, dtype=torch.int64)
    rank_TE = (x_TD @ layer.router.weight_ED.T).sigmoid() + layer.router.bias_E
    for token in rank_TE.tolist():
        for e in sorted(range(len(token)), key=lambda e: -token[e])[:2]:
            counts_E[e] += 1
    return counts_E


# --- counting ---------------------------------------------------------------------------------


def save_products(ctx: Any, op: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    product = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE


def selective(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, save_products)
    y: Tensor = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    return y


def twice(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A checkpoint in a checkpoint: the forward runs three times."""
    y: Tensor = checkpoint(lambda x: not_reentrant(layer, x), x, use_reentrant=True)
    return y


def not_reentrant(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(layer, x, use_reentrant=False)
    return y


def reentrant(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(layer, x, use_reentrant=True)
    return y


def hidden(layer: MoE, x: Tensor) -> Tensor:
    out: MoEOutput = layer(x)
    return out.hidden


def plain(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x)


WAYS: list[tuple[Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], int]] = [
    (plain, 1),
    (reentrant, 2),
    (not_reentrant, 2),
    (selective, 2),
    (twice, 3),
]


@pytest.mark.parametrize(("way", "runs"), WAYS, ids=[way.__name__ for way, _ in WAYS])
def test_a_step_is_counted_once_however_often_its_forward_runs(way: Any, runs: int) -> None:
    layer, ran = single(), []

    def forward(x: Tensor) -> Tensor:
        ran.append(1)
        out: MoEOutput = layer(x)
        return out.hidden

    for seed in range(3):  # gradient accumulation
        way(forward, tokens(seed)).sum().backward()
    assert len(ran) == 3 * runs
    want = sum((choices(layer, tokens(seed)) for seed in range(3)), torch.tensor(0))
    assert layer.router.seen_E.dtype is torch.int64
    assert torch.equal(layer.router.seen_E, want) and want.sum() == 3 * TOKENS * 2
    assert len(set(want.tolist())) > 1


def test_layers_in_a_row_count_the_same_with_and_without_recomputation() -> None:
    seen: list[list[Tensor]] = []
    for way, _ in WAYS:
        layers = [single(), single()]
        x = tokens(0)
        for layer in layers:
            x = x + way(functools.partial(hidden, layer), x)
        x.sum().backward()
        seen.append([layer.router.seen_E for layer in layers])
    assert all(torch.equal(torch.stack(s), torch.stack(seen[0])) for s in seen)
    assert [s.sum() for s in seen[0]] == [TOKENS * 2] * 2


def test_micro_batches_in_flight_are_each_counted() -> None:
    """Several forwards before the first backward, as a pipeline has them."""
    layer = single()
    outs = [layer(tokens(seed)) for seed in range(3)]
    assert layer.router.seen_E.sum() == 0
    for done, out in enumerate(reversed(outs), 1):
        out.hidden.sum().backward()
        assert layer.router.seen_E.sum() == done * TOKENS * 2
    assert torch.equal(layer.router.seen_E, sum((o.counts_E for o in outs), torch.tensor(0)))


def test_a_second_backward_of_one_forward_counts_no_more() -> None:
    layer, x = single(), tokens(0).requires_grad_()
    out = layer(x).hidden
    torch.autograd.grad(out.sum(), x, retain_graph=True)  # a penalty on the gradient, say
    out.sum().backward(retain_graph=True)
    out.square().sum().backward()
    assert layer.router.seen_E.sum() == TOKENS * 2


@pytest.mark.parametrize(
    "dispatcher", [Local, lambda mesh: AllToAll(mesh, 8)], ids=["here", "sent"]
)
def test_whoever_adds_to_the_counts_adds_to_his_own(
    dispatcher: Callable[[MoEMesh], Dispatcher[Any]],
) -> None:
    """They are handed out before backward counts, and before it needs them."""
    mesh = MoEMesh.single()
    layer = MoE(CONFIG, mesh, dispatcher(mesh))
    init_weights(layer, mesh, seed=1, std=0.5)
    out = layer(tokens(0))
    counts_E = out.counts_E.clone()
    out.counts_E.add_(1)
    out.dropped.add_(1)
    out.hidden.sum().backward()
    assert counts_E.any() and layer.router.seen_E.equal(counts_E)


def test_what_is_not_trained_on_is_not_counted() -> None:
    layer = single()
    out = layer(tokens(0))  # its backward never comes
    with torch.no_grad():
        layer(tokens(1))
    layer.eval()
    layer(tokens(2)).hidden.sum().backward()  # a gradient, for instance of the input, but no step
    assert layer.router.seen_E.tolist() == [0] * 8
    assert out.counts_E.sum() == TOKENS * 2 and out.counts_E.dtype is torch.int64
    layer.train()
    layer(tokens(0)).hidden.sum().backward()
    assert torch.equal(layer.router.seen_E, out.counts_E)


def test_padding_is_not_counted_and_given_ids_are() -> None:
    layer, mask = single(), torch.arange(TOKENS) % 3 > 0
    layer(tokens(0), mask).hidden.sum().backward()
    assert torch.equal(layer.router.seen_E, choices(layer, tokens(0)[mask]))
    layer.router.seen_E.zero_()
    layer(tokens(0), mask, torch.tensor([5, 2]).expand(TOKENS, 2)).hidden.sum().backward()
    n = int(mask.sum())
    assert layer.router.seen_E.tolist() == [0, 0, n, 0, 0, n, 0, 0]


def test_counting_needs_a_gradient_of_anything_not_of_the_input() -> None:
    """The first layer's input may need none, and of the layer's weights some may be frozen."""
    for name in ("router.weight_ED", "experts.w2_eDF"):
        layer = single().requires_grad_(False)
        layer.get_parameter(name).requires_grad_()
        layer(tokens(0).detach()).hidden.sum().backward()
        assert torch.equal(layer.router.seen_E, choices(layer, tokens(0)))


# --- the selection bias -----------------------------------------------------------------------

ROUTERS, RATE = 3, 0.25


def counted(rank: int, which: int) -> list[int]:
    """What a rank has seen at a router. Router 2 is balanced already."""
    if which == 2:
        return [rank + 1] * 4
    return [(rank + which) % 3, 5, 3 * rank, 0]


def update_on_rank(layout: Layout, reduced: dict[int, int]) -> list[tuple[Tensor, Tensor]]:
    mesh, rank = MoEMesh.init("cpu", dp=layout.dp, cp=layout.cp, tp=layout.tp), dist.get_rank()
    routers = [Router(RouterConfig(4, top_k=2), 3, mesh) for _ in range(ROUTERS)]
    for which, router in enumerate(routers):
        router.bias_E.copy_(torch.tensor([0.5, 0.0, -1.0, 2.0]))
        router.seen_E.copy_(torch.tensor(counted(rank, which)))
    before = reduced[rank]
    update_selection_bias(routers, mesh, RATE)
    assert reduced[rank] - before == sum(mesh[role].size > 1 for role in DENSE)
    return [(router.bias_E, router.seen_E) for router in routers]


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dp=2), Layout(cp=3), Layout(tp=4), Layout(2, 1, 3), Layout(2, 2, 2)],
    ids=str,
)
def test_the_bias_moves_towards_experts_that_were_chosen_too_seldom(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced = dict.fromkeys(range(layout.world), 0)

    def spy(*args: Any) -> Tensor:
        reduced[dist.get_rank()] += 1
        return all_reduce(*args)

    all_reduce: Callable[..., Tensor] = funcol.all_reduce
    monkeypatch.setattr(funcol, "all_reduce", spy)
    by_rank = threaded(layout.world, update_on_rank, layout, reduced)
    for which in range(ROUTERS):
        seen = [sum(counted(r, which)[e] for r in range(layout.world)) for e in range(4)]
        average = sum(seen) / 4
        push = [RATE if n < average else -RATE if n > average else 0.0 for n in seen]
        want = [b + p for b, p in zip([0.5, 0.0, -1.0, 2.0], push, strict=True)]
        assert any(push) == (which < 2)
        for routers in by_rank:
            bias_E, seen_E = routers[which]
            assert bias_E.tolist() == want and seen_E.tolist() == [0] * 4


def test_no_routers_and_nothing_seen_change_nothing() -> None:
    update_selection_bias([], MoEMesh.single(), RATE)
    layer = single()
    update_selection_bias([layer.router], layer.mesh, RATE)
    assert layer.router.bias_E.tolist() == [0.0] * 8


def test_large_counts_are_told_apart() -> None:
    """float32 has no number between 2**24 and 2**24 + 2."""
    mesh = MoEMesh.single()
    router = Router(RouterConfig(4, top_k=2), 3, mesh)
    router.seen_E.copy_(torch.tensor([2**24 + 1, 2**24] * 2))
    update_selection_bias([router], mesh, RATE)
    assert router.bias_E.tolist() == [-RATE, RATE] * 2


def test_updates_spread_the_load() -> None:
    """A router that would send everything to two experts comes to use all."""
    layer, loads, x = single(), [], tokens(3).detach()
    layer.router.bias_E[:2] = 1.0
    for _ in range(60):
        layer(x).hidden.sum().backward()
        loads.append(int(layer.router.seen_E.max()))
        update_selection_bias([layer.router], layer.mesh, 0.02)
    assert loads[0] == TOKENS and max(loads[-5:]) <= 5


def test_the_bias_travels_in_the_state_dict() -> None:
    layer, other = single(), single()
    layer.router.bias_E.copy_(torch.linspace(-1, 1, 8))
    layer(tokens(0)).hidden.sum().backward()
    state = layer.state_dict()
    assert {"router.bias_E", "router.seen_E"} <= state.keys()
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.fill_(3)
    assert not torch.equal(other(tokens(0)).counts_E, layer(tokens(0)).counts_E)
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]) and value.dtype is state[name].dtype, name
    assert torch.equal(other(tokens(0)).hidden, layer(tokens(0)).hidden)
    assert other.router.seen_E.sum() == TOKENS * 2
