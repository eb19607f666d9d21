"""What is wrong before the first token moves: told at once, on every rank that is there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spmd_moe import (
    CLAMPED_SWIGLU,
    EP,
    Activation,
    AllGather,
    AllToAll,
    FixedCapacity,
    Local,
    MoE,
    MoEConfig,
    MoEMesh,
    MoEOutput,
    RouterConfig,
    SharedConfig,
    SpmdMoeError,
    expert_load,
    init_weights,
)
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.placement import placements_of
from spmd_moe.layer.dispatch import Arrived
from spmd_moe.layer.dispatch.local import Sorted
from spmd_moe.layer.experts import Experts
from tests.support.simulated_ranks import fake_world
from tests.support.workers import run

CONFIG = MoEConfig(6, 8, RouterConfig(8, 2))


def mesh_of_four() -> MoEMesh:
    return MoEMesh.init("cpu", dp=2, tp=2, ep=4)


def refusal(act: Callable[[], object]) -> str:
    """The first line of what is raised."""
    try:
        act()
    except SpmdMoeError as error:
        return str(error).splitlines()[0]
    return "nothing was refused"


# --- ranks that differ ------------------------------------------------------------------------


def other_width() -> None:
    MoE(CONFIG if dist.get_rank() else replace(CONFIG, dim=12), mesh_of_four())


def other_router() -> None:
    MoE(replace(CONFIG, router=RouterConfig(8, 1 + dist.get_rank() % 2)), mesh_of_four())


def other_dispatcher() -> None:
    mesh = mesh_of_four()
    made: Any = AllGather(mesh, 8) if dist.get_rank() == 3 else AllToAll(mesh, 8)
    MoE(CONFIG, mesh, made)


def other_number() -> None:
    AllToAll(mesh_of_four(), 8 if dist.get_rank() else 16)


def other_number_of_ones_own() -> None:
    mesh = mesh_of_four()
    made: Any = Local(MoEMesh.single())
    made.num_experts = 8 if dist.get_rank() else 16
    MoE(CONFIG, mesh, made)


def no_room_on_one() -> None:
    FixedCapacity(mesh_of_four(), 8, min(dist.get_rank(), 2))


def other_seed() -> None:
    layer = MoE(CONFIG, mesh_of_four())
    init_weights(layer, layer.mesh, seed=dist.get_rank() // 2, std=0.5)


def at_the_end_of_much() -> None:
    mesh_of_four().check_ranks_agree("job", {"names": "a" * 9_000, "ranks": "b" * dist.get_rank()})


DIFFERING = {
    other_width: "MoE: the ranks were called with different settings: "
    "dim=12 on ranks [0] | dim=6 on ranks [1, 2, 3].",
    other_router: "MoE: the ranks were called with different settings: "
    "router.top_k=1 on ranks [0, 2] | router.top_k=2 on ranks [1, 3].",
    other_dispatcher: "MoE: the ranks were called with different settings: "
    "dispatcher=AllToAll on ranks [0, 1, 2] | dispatcher=AllGather on ranks [3].",
    other_number: "AllToAll: the ranks were called with different settings: "
    "num_experts=16 on ranks [0] | num_experts=8 on ranks [1, 2, 3].",
    other_number_of_ones_own: "MoE: the ranks were called with different settings: "
    "dispatcher.num_experts=16 on ranks [0] | dispatcher.num_experts=8 on ranks [1, 2, 3].",
    no_room_on_one: "FixedCapacity: the ranks were called with different settings: "
    "rows_per_rank=0 on ranks [0] | rows_per_rank=1 on ranks [1] | "
    "rows_per_rank=2 on ranks [2, 3].",
    other_seed: "init_weights: the ranks were called with different settings: "
    "seed=0 on ranks [0, 1] | seed=1 on ranks [2, 3].",
    at_the_end_of_much: "job: the ranks were called with different settings: "
    "ranks= on ranks [0] | ranks=b on ranks [1] | ranks=bb on ranks [2] | ranks=bbb on ranks [3].",
}


@pytest.mark.parametrize("act", DIFFERING, ids=lambda act: act.__name__)
def test_ranks_that_differ_are_told_on_every_rank(act: Callable[[], None]) -> None:
    assert threaded(4, refusal, act) == [DIFFERING[act]] * 4


@pytest.mark.gloo
def test_processes_that_differ_are_told() -> None:
    assert run(4, refusal, other_router) == [DIFFERING[other_router]] * 4


def test_ranks_that_agree_exchange_once_per_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """One digest along each dense axis that has ranks: for layer, dispatcher and weights."""
    calls: list[int] = []
    gather = dist.all_gather

    def noted(parts: list[Tensor], mine: Tensor, group: Any = None) -> None:
        calls.append(mine.numel())
        gather(parts, mine, group=group)

    with fake_world(4):
        mesh = mesh_of_four()
        monkeypatch.setattr(dist, "all_gather", noted)
        init_weights(MoE(CONFIG, mesh), mesh, seed=0)
    assert calls == [32, 64] * 3


def test_one_process_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather", None)
    init_weights(MoE(CONFIG, MoEMesh.single()), MoEMesh.single(), seed=0)


def test_a_layer_is_built_without_memory() -> None:
    with fake_world(4):
        mesh = mesh_of_four()
        with torch.device("meta"):
            layer = MoE(CONFIG, mesh)
        assert layer.experts.w1_eFD.is_meta
        with FakeTensorMode():
            assert MoE(CONFIG, mesh).router.weight_ED.shape == (8, 6)


# --- the dispatcher ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [4, 12])
@pytest.mark.parametrize("kind", [AllGather, AllToAll])
def test_a_dispatcher_of_another_number_of_experts(kind: Any, number: int) -> None:
    with fake_world(4):
        mesh = mesh_of_four()
        text = refusal(lambda: MoE(CONFIG, mesh, kind(mesh, number)))
    assert text == f"MoE: the dispatcher is built for {number} experts, the router chooses among 8."


@pytest.mark.parametrize(("axis", "sizes"), [("ep", (2, 1)), ("etp", (1, 2))])
def test_local_is_for_whole_experts(axis: str, sizes: tuple[int, int]) -> None:
    with fake_world(2):
        mesh = MoEMesh.init("cpu", dp=2, ep=sizes[0], etp=sizes[1])
        text = refusal(lambda: Local(mesh))
    assert text == f"Local: the experts are sharded on axis '{axis}' (2 ranks)."


def test_a_dispatcher_of_ones_own_may_serve_any_number_of_experts() -> None:
    class Own:
        """Local under another name, which forecasts nothing."""

        num_experts, fixed_shapes, axes = None, False, ()

        def __init__(self, mesh: MoEMesh) -> None:
            self._local = Local(mesh)
            self.collect, self.combine = self._local.collect, self._local.combine

        def forecast(self, batch: object) -> None:
            pass

        def dispatch(self, *given: Any) -> tuple[Arrived, Sorted]:
            return self._local.dispatch(*given)

    mesh = MoEMesh.single()
    layer = MoE(CONFIG, mesh, Own(mesh))
    init_weights(layer, mesh, seed=0)
    assert layer(torch.ones(3, 6)).hidden.isfinite().all()


# --- settings and arguments of another kind ---------------------------------------------------

ALONE = MoEMesh.single()
NUMBER = "it must be an integer of 1 or more."
ROOM = f"it must be an integer from 1 to {2**24}."


def made(kind: Any, *given: object, **settings: object) -> tuple[Any, Any, Any]:
    return kind, given, settings


OTHER_KINDS = {
    f"FixedCapacity: rows_per_rank is 2.5; {ROOM}": made(FixedCapacity, ALONE, 8, 2.5),
    f"FixedCapacity: rows_per_rank is None; {ROOM}": made(FixedCapacity, ALONE, 8, None),
    # float32, in which counts travel, holds no odd number above it
    f"FixedCapacity: rows_per_rank is {2**24 + 1}; {ROOM}": made(
        FixedCapacity, ALONE, 8, 2**24 + 1
    ),
    f"FixedCapacity: num_experts is 8.0; {NUMBER}": made(FixedCapacity, ALONE, 8.0, 2),
    f"AllToAll: num_experts is '8'; {NUMBER}": made(AllToAll, ALONE, "8"),
    f"AllGather: num_experts is True; {NUMBER}": made(AllGather, ALONE, True),
    "AllGather: mesh is None; it must be an MoEMesh.": made(AllGather, None, 8),
    "Local: mesh is the class MoEMesh; it must be an MoEMesh.": made(Local, MoEMesh),
    "RouterConfig: route_scale is '2'; it must be a finite number above 0.": made(
        RouterConfig, 8, 2, route_scale="2"
    ),
    "RouterConfig: route_scale is 0.0; it must be a finite number above 0.": made(
        RouterConfig, 8, 2, route_scale=0.0
    ),
    "RouterConfig: route_scale is inf; it must be a finite number above 0.": made(
        RouterConfig, 8, 2, route_scale=float("inf")
    ),
    "RouterConfig: jitter is 'x'; it must be a number from 0 to below 1.": made(
        RouterConfig, 8, 2, jitter="x"
    ),
    "RouterConfig: score_func is ['softmax'].": made(RouterConfig, 8, 2, score_func=["softmax"]),
    f"RouterConfig: num_experts is nan; {NUMBER}": made(RouterConfig, float("nan"), 2),
    f"RouterConfig: group_score_top_k is 2.0; {NUMBER}": made(
        RouterConfig, 8, 2, group_score_top_k=2.0
    ),
    "RouterConfig: route_norm is a str; it must be a bool.": made(
        RouterConfig, 8, 2, route_norm="no"
    ),
    "SharedConfig: gated is an int; it must be a bool.": made(SharedConfig, 8, gated=1),
    "MoEConfig: bias is a str; it must be a bool.": made(
        MoEConfig, 6, 8, CONFIG.router, bias="none"
    ),
    "expert_load: mesh is None; it must be an MoEMesh.": made(
        lambda mesh: expert_load(of_one_token(), mesh), None
    ),
    "MoE.forward: mask is a list; it must be a Tensor.": made(lambda mask: of_one_token(mask), [1]),
}


def of_one_token(mask: Any = None) -> MoEOutput:
    layer = MoE(CONFIG, ALONE)
    init_weights(layer, ALONE, seed=0)
    output: MoEOutput = layer(torch.ones(1, 6), mask)
    return output


@pytest.mark.parametrize("text", OTHER_KINDS)
def test_what_is_of_another_kind_is_told_where_it_is_given(text: str) -> None:
    kind, given, settings = OTHER_KINDS[text]
    assert refusal(lambda: kind(*given, **settings)) == text


def test_experts_that_a_dispatcher_cannot_share_out() -> None:
    with fake_world(4):
        mesh = mesh_of_four()
        for kind in (AllGather, AllToAll):
            text = refusal(lambda kind=kind: kind(mesh, 6))  # type: ignore[misc]  # its own
            assert text.endswith(": num_experts=6 cannot be split over axis 'ep' (4 ranks).")


# --- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AllGather, AllToAll])
def test_a_wrong_dtype_is_told_before_any_token_is_sent(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_world(4):
        mesh = mesh_of_four()
        layer = MoE(CONFIG, mesh, kind(mesh, 8))
        entered: list[Tensor] = []
        enter = layer.boundary.enter

        def seen(x: Tensor) -> Any:
            entered.append(x)
            return enter(x)

        monkeypatch.setattr(layer.boundary, "enter", seen)
        text = refusal(lambda: layer(torch.ones(3, 6, dtype=torch.bfloat16)))
    assert text == "MoE.forward: x is bf16[3, 6], the layer f32."
    assert [len(x) for x in entered] == [0]


def test_weights_that_are_cast_when_the_experts_run_are_not_judged_early() -> None:
    """As FSDP does: until the experts run, w1 is something else than it will be there."""
    mesh = MoEMesh.single()
    layer = MoE(CONFIG, mesh)
    init_weights(layer, mesh, seed=0)
    stored = dict(layer.experts.named_parameters(recurse=False))

    class Sharded(Tensor):
        """Stands for DTensor."""

    def swap(cast: Callable[[Tensor], Tensor]) -> None:
        for name, parameter in stored.items():
            layer.experts._parameters[name] = cast(parameter)  # type: ignore[assignment]

    swap(lambda p: p.detach().as_subclass(Sharded))
    layer.experts.register_forward_pre_hook(
        lambda module, args: swap(lambda p: nn.Parameter(p.detach().bfloat16()))
    )
    assert layer(torch.ones(3, 6, dtype=torch.bfloat16)).hidden.dtype is torch.bfloat16


def test_rows_of_padding_are_zero_whatever_the_shared_expert_makes_of_zeros() -> None:
    mesh = MoEMesh.single()
    ones = Activation("shifted", False, lambda gate, up: gate + 1.0)
    layer = MoE(replace(CONFIG, activation=ones, shared=SharedConfig(4)), mesh)
    init_weights(layer, mesh, seed=0)
    mask = torch.tensor([True, False, True])
    rows = layer(torch.ones(3, 6), mask).hidden
    assert rows[1].eq(0).all() and rows[0].ne(0).all()


# --- weights ----------------------------------------------------------------------------------


def test_nothing_is_drawn_where_something_has_no_placement() -> None:
    layer = MoE(CONFIG, MoEMesh.single())
    model = nn.Sequential(layer, nn.Linear(6, 6))
    with pytest.raises(SpmdMoeError, match=r"no placement is declared for 1\.weight, 1\.bias\."):
        init_weights(model, MoEMesh.single(), seed=0)
    assert layer.router.weight_ED.isnan().all()


def test_a_mesh_of_the_same_layout_is_the_same() -> None:
    with fake_world(4):
        layer = MoE(CONFIG, mesh_of_four())
        init_weights(layer, mesh_of_four(), seed=0)
        with pytest.raises(SpmdMoeError, match="the layer is on"):
            init_weights(layer, MoEMesh.init("cpu", tp=4, ep=4), seed=0)


# --- copies -----------------------------------------------------------------------------------


def copied() -> tuple[bool, bool, bool]:
    """Same output; same mesh, groups and activation; weights of its own."""
    mesh = mesh_of_four() if dist.is_initialized() else MoEMesh.single()
    layer = MoE(replace(CONFIG, activation=CLAMPED_SWIGLU, shared=SharedConfig(8)), mesh)
    init_weights(layer, mesh, seed=0)
    twin, x = copy.deepcopy(layer), torch.ones(3, 6)
    before = layer(x).hidden
    with torch.no_grad():
        twin.experts.w1_eFD.zero_()
    shared = twin.mesh is mesh and twin.experts.etp is layer.experts.etp
    same = twin.config == layer.config and twin.experts.activation is CLAMPED_SWIGLU
    return (
        torch.equal(layer(x).hidden, before),
        shared and same,
        torch.equal(twin(x).hidden, before),
    )


def test_a_copy_of_a_layer_is_on_the_same_mesh() -> None:
    assert copied() == (True, True, False)
    mesh = MoEMesh.single()
    assert copy.copy(mesh) is mesh and copy.copy(mesh[EP]) is mesh[EP]


@pytest.mark.gloo
def test_a_copy_of_a_layer_on_processes() -> None:
    assert run(4, copied) == [(True, True, False)] * 4


def test_what_a_copy_computes() -> None:
    layer = MoE(CONFIG, MoEMesh.single())
    init_weights(layer, layer.mesh, seed=0)
    x = torch.randn(5, 6)
    assert torch.equal(copy.deepcopy(layer)(x).hidden, layer(x).hidden)


# --- kinds, asked of an object ----------------------------------------------------------------


def test_placements_of_an_object_are_those_of_its_class() -> None:
    layer = MoE(CONFIG, MoEMesh.single())
    assert placements_of(layer.experts) == placements_of(Experts) != {}
    assert placements_of(layer.experts.forward) == placements_of(Experts.forward) != {}
