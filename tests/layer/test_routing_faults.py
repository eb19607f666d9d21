"""Scores that are not finite, ids out of range: one error on every rank, with nothing lost."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor

from spmd_moe import (
    DP,
    EP,
    TP,
    AllGather,
    AllToAll,
    Axis,
    DedupAllToAll,
    Dispatcher,
    I,
    Kind,
    MoE,
    MoEConfig,
    MoEMesh,
    R,
    RouterConfig,
    RoutingError,
    S,
    SharedConfig,
    expert_load,
    init_weights,
)
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.router import Router
from spmd_moe.layer.routing_faults import check_marks, mark_faults
from tests.support.simulated_ranks import simulated
from tests.support.workers import run

CONFIG = MoEConfig(6, 8, RouterConfig(8, 2))
# dp, tp, ep, etp of worlds in which each rank meets all others.
WORLDS = [(4, 1, 4, 1), (2, 2, 2, 2), (1, 4, 1, 4)]
FAULTS = ["nan", "inf", "id 8", "id -2"]


def made(
    dispatcher: type[AllToAll] | type[DedupAllToAll] | type[AllGather],
    dp: int,
    tp: int,
    ep: int,
    etp: int,
) -> tuple[MoE, MoEMesh]:
    mesh = MoEMesh.init("cpu", dp=dp, tp=tp, ep=ep, etp=etp)
    chosen: Dispatcher[Any] = dispatcher(mesh, 8)
    layer = MoE(CONFIG, mesh, chosen)
    init_weights(layer, mesh, seed=0)
    return layer, mesh


def faulty(fault: str) -> tuple[Tensor, Tensor]:
    """Tokens and ids, which are wrong on the last rank only: a number, or all ids of a token."""
    x, ids = torch.ones(3, 6), torch.zeros(3, 2, dtype=torch.int64)
    if dist.get_rank() == dist.get_world_size() - 1:
        if fault.startswith("id"):
            ids[1] = int(fault.removeprefix("id "))
        else:
            x[1, 1] = float(fault)
    return x, ids


def told(
    dispatcher: type[AllToAll] | type[DedupAllToAll] | type[AllGather],
    world: tuple[int, ...],
    fault: str,
) -> tuple[str, bool]:
    """What this rank is told, and whether the layer computes the same after it as before."""
    layer, _ = made(dispatcher, *world)
    x, ids = torch.ones(3, 6), torch.zeros(3, 2, dtype=torch.int64)
    before = layer(x, None, ids).hidden
    try:
        layer(faulty(fault)[0], None, faulty(fault)[1])
    except RoutingError as error:
        return str(error).splitlines()[0], torch.equal(layer(x, None, ids).hidden, before)
    return "nothing", False


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("dispatcher", [AllToAll, DedupAllToAll, AllGather])
def test_every_rank_is_told_alike(
    dispatcher: type[AllToAll] | type[DedupAllToAll] | type[AllGather],
    world: tuple[int, ...],
    fault: str,
) -> None:
    what = "expert_ids name experts that do not exist" if "id" in fault else "scores are NaN"
    (text, usable), *others = threaded(4, told, dispatcher, world, fault)
    assert usable and all(other == (text, True) for other in others)
    _, _, ep, etp = world
    assert what in text and text.endswith(f"on 1 of 4 ranks (etp {etp - 1} ep {ep - 1}).")


@pytest.mark.gloo
def test_every_process_is_told_alike() -> None:
    (text, usable), *others = run(4, told, AllToAll, WORLDS[1], "nan")
    assert "scores are NaN or infinite on 1 of 4 ranks (etp 1 ep 1)." in text
    assert usable and all(other == (text, True) for other in others)


def told_on_tp(tp: int, ep: int, src: Kind, dst: Kind, sharded: bool, fault: str) -> list[str]:
    """What a rank is told, one of whose tokens is wrong; then, whether the layer still works."""
    mesh = MoEMesh.init("cpu", dp=2, tp=tp, ep=ep)
    shared = SharedConfig(8, sharded=True) if sharded else None
    layer = MoE(replace(CONFIG, src=src, dst=dst, shared=shared), mesh)
    init_weights(layer, mesh, seed=0)
    x, ids = torch.ones(tp, 6), torch.zeros(tp, 2, dtype=torch.int64)
    before, said = layer(x, None, ids).hidden, "nothing"
    wrong, wrong_ids = x.clone(), ids.clone()
    if mesh[DP].rank == 0 and (src is not S(0) or mesh[TP].rank == 1):
        if fault == "nan":
            wrong[1] = math.nan
        else:
            wrong_ids[1] = 8
    try:
        layer(wrong, None, wrong_ids)
    except RoutingError as error:
        said = str(error).split(" on ")[0]
    # The ranks of the other cell of dp are not informed, and do not wait.
    return [said, "as before" if torch.equal(layer(x, None, ids).hidden, before) else "broken"]


@pytest.mark.parametrize("fault", ["nan", "id"])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize(
    ("src", "dst", "sharded"),
    [(I, I, False), (R, S(0), False), (S(0), R, False), (S(0), S(0), True)],
    ids=str,
)
def test_all_ranks_of_tp_are_told_where_they_meet(
    src: Kind, dst: Kind, sharded: bool, ep: int, fault: str
) -> None:
    """Ranks of tp that exchange no rows, but gather tokens: who is not told computes nonsense."""
    *first, last = threaded(8, told_on_tp, 4, ep, src, dst, sharded, fault)
    said = "scores are NaN or infinite" if fault == "nan" else "expert_ids name experts that do not"
    assert all(s.startswith(f"Router: {said}") and after == "as before" for s, after in first[:4])
    assert [*first[4:], last] == [["nothing", "as before"]] * 4


@pytest.mark.gloo
def test_processes_of_tp_are_told_where_they_meet() -> None:
    heard = run(4, told_on_tp, 2, 1, I, I, False, "nan")
    said = ["Router: scores are NaN or infinite", "as before"]
    assert heard == [said, said, ["nothing", "as before"], ["nothing", "as before"]]


def test_both_faults_at_once_are_counted_apart() -> None:
    def both() -> str:
        layer, _ = made(AllToAll, 4, 1, 4, 1)
        x, ids = torch.ones(1, 6), torch.full((1, 2), 9)
        x = x * torch.nan if dist.get_rank() < 2 else x
        with pytest.raises(
            RoutingError, match=r"or infinite on 2 of 4 ranks \(etp 0 ep 0, etp 0 ep 1\)"
        ):
            layer(x, None, ids)
        with pytest.raises(RoutingError, match=r"do not exist on 4 of 4 ranks\.") as error:
            layer(torch.ones(1, 6), None, ids)
        fix = str(error.value).split("fix: ")[1].splitlines()[0]
        given = {"expert_ids": torch.tensor([[9, -2]])}
        exec(fix, given)
        return "told" if layer(torch.ones(1, 6), None, given["expert_ids"]).dropped == 2 else fix

    assert threaded(4, both) == ["told"] * 4


@pytest.mark.parametrize("ranks_of_nan", [1, 4])
@pytest.mark.parametrize("way", [(AllToAll, 4, 1, 4, 1), (AllGather, 2, 2, 2, 2)], ids=str)
def test_init_weights_is_offered_where_it_can_help(way: Any, ranks_of_nan: int) -> None:
    """Weights that were never set are NaN on all ranks; NaN on some ranks is in their tokens."""

    def offered() -> bool:
        layer, _ = made(*way)
        x = torch.ones(1, 6) * (torch.nan if dist.get_rank() < ranks_of_nan else 1)
        with pytest.raises(RoutingError) as error:
            layer(x)
        return "init_weights" in str(error.value)

    assert threaded(4, offered) == [ranks_of_nan == 4] * 4


def test_many_ranks_are_named_in_part() -> None:
    axis = Axis(EP, "north", 64, 0, MoEMesh.single()[EP].group)
    with pytest.raises(
        RoutingError, match=r"on 63 of 64 ranks \(north 1, .* north 8 and 55 more\)"
    ):
        check_marks([0] + [1] * 63, [axis], num_experts=64)


def test_large_scores_are_no_fault_although_their_sum_is() -> None:
    layer, x = MoE(CONFIG, mesh := MoEMesh.single()), torch.ones(3, 6)
    init_weights(layer, mesh, seed=0)
    with torch.no_grad():
        layer.router.weight_ED.fill_(0.1 * torch.finfo(torch.float32).max)
        logits_TE, out = layer.router(x).logits_TE, layer(x)
    assert logits_TE.isfinite().all() and not logits_TE.sum().isfinite()
    assert out.hidden.isfinite().all() and out.hidden.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, in its own code
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs one of C++")
def test_compiled_scores_are_marked_as_well() -> None:
    """A compiler may take x * 0 for 0, for every x."""
    compiled = torch.compile(mark_faults, fullgraph=True)
    for value, want in ((1.0, False), (math.nan, True), (math.inf, True), (-math.inf, True)):
        scores = torch.ones(3, 4)
        scores[1, 2] = value
        assert bool(mark_faults(scores, None, 4)) is bool(compiled(scores, None, 4)) is want


def test_what_a_mask_hides_is_no_fault() -> None:
    mesh = MoEMesh.single()
    layer = MoE(CONFIG, mesh)
    init_weights(layer, mesh, seed=0)
    x = torch.ones(3, 6, requires_grad=True)
    hidden = torch.tensor([False, True, False])
    spoiled = torch.where(hidden.unsqueeze(1), torch.nan, x)
    out = layer(spoiled, ~hidden).hidden
    out.sum().backward()
    assert out.isfinite().all() and not out[1].any() and out[0].any()
    assert x.grad is not None and x.grad.isfinite().all()


# --- the load -----------------------------------------------------------------------------------


def loaded() -> tuple[list[int], float, float, int]:
    """One rank chooses expert 0 twice, the others 1 and 2; the last leaves a choice open."""
    layer, mesh = made(AllToAll, 2, 2, 4, 1)
    rank = dist.get_rank()
    ids = torch.tensor([[0, 0] if rank == 0 else [1, 2 if rank < 3 else -1]])
    load = expert_load(layer(torch.ones(1, 6), None, ids), mesh)
    return load.counts_E.tolist(), load.max_over_mean.item(), load.entropy.item(), int(load.dropped)


def test_the_load_is_that_of_all_ranks() -> None:
    shares = torch.tensor([2.0, 3.0, 2.0]) / 7
    entropy = -(shares * shares.log()).sum().item() / torch.tensor(8.0).log().item()
    for counts, max_over_mean, spread, dropped in threaded(4, loaded):
        assert counts == [2, 3, 2, 0, 0, 0, 0, 0] and dropped == 1
        assert max_over_mean == pytest.approx(3 / 7 * 8) and spread == pytest.approx(entropy)


@pytest.mark.parametrize("experts", [1, 4])
def test_the_load_of_no_choices_and_of_one_expert(experts: int) -> None:
    mesh = MoEMesh.single()
    layer = MoE(replace(CONFIG, router=RouterConfig(experts, 1)), mesh)
    init_weights(layer, mesh, seed=0)
    none = expert_load(layer(torch.ones(0, 6)), mesh)
    assert str(none) == f"0 choices of {experts} experts: max/mean 0.00, entropy 0.000, dropped 0"
    alone = expert_load(layer(torch.ones(5, 6), None, torch.zeros(5, 1, dtype=torch.int64)), mesh)
    assert alone.entropy == 0 and alone.max_over_mean == experts and alone.counts_E[0] == 5


def test_balanced_choices_have_full_entropy() -> None:
    mesh = MoEMesh.single()
    layer = MoE(replace(CONFIG, router=RouterConfig(8, 2, force_balance=True)), mesh)
    init_weights(layer, mesh, seed=0)
    load = expert_load(layer(torch.randn(8, 6)), mesh)
    assert load.max_over_mean == 1 and load.entropy.item() == pytest.approx(1)


def test_one_of_many_simulated_ranks() -> None:
    """Where all ranks are one process, what one of them sees ends them all."""
    with simulated(2) as mode:
        mesh = MoEMesh.init("cpu", dp=2)
        layer = MoE(CONFIG, mesh)
        init_weights(layer, mesh, seed=0)
        x = mode.rank_map(lambda rank: torch.full((3, 6), math.nan if rank else 1.0))
        with pytest.raises(RoutingError, match="scores are NaN or infinite"):
            layer(x)
        x = mode.rank_map(lambda rank: torch.full((3, 6), 1.0 + rank))
        assert layer(x).counts_E.sum() == 3 * CONFIG.router.top_k


# --- jitter -------------------------------------------------------------------------------------


def jittered(degrees: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A training forward, the same computed again under a checkpoint, and one of evaluation."""
    torch.manual_seed(5)
    mesh = MoEMesh.init("cpu", **degrees)
    layer = MoE(replace(CONFIG, router=RouterConfig(8, 2, jitter=0.3)), mesh)
    init_weights(layer, mesh, seed=0, std=1.0)
    noises: list[Tensor] = []

    def seen(module: Any, args: Any, routing: Any) -> None:
        noises.append(routing.logits_TE.detach())

    layer.router.register_forward_hook(seen)
    x = torch.ones(3, 6, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(lambda t: layer(t).hidden, x, use_reentrant=False)
    out.sum().backward()
    layer.eval()(x)
    first, again, plain = noises
    return first, again, plain


@pytest.mark.gloo
@pytest.mark.parametrize("degrees", [{"dp": 2, "tp": 2}, {"cp": 4}, {"dp": 2, "cp": 2}], ids=str)
def test_noise_differs_by_rank_and_is_the_same_when_computed_again(degrees: dict[str, int]) -> None:
    """Ranks have other tokens on every dense axis, so each has a stream of its own."""
    by_rank = run(4, jittered, degrees)
    for first, again, plain in by_rank:
        assert torch.equal(first, again) and not torch.equal(first, plain)
    firsts = [first for first, _, _ in by_rank]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    assert torch.equal(*(plain for _, _, plain in by_rank[:2]))


def test_noise_scales_up_as_much_as_down() -> None:
    torch.manual_seed(0)
    router = Router(RouterConfig(4, 2, jitter=0.25), 4, MoEMesh.single())
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4))  # so that a logit is an input with its noise
    noise = router(torch.ones(500, 4)).logits_TE
    assert 0.75 <= noise.min() < 0.76 and 1.24 < noise.max() <= 1.25
    assert noise.mean().item() == pytest.approx(1, abs=0.01)


def test_ids_of_padding_may_be_anything() -> None:
    """As NaN in padding may: what is masked is not looked at."""
    mesh = MoEMesh.single()
    layer = MoE(CONFIG, mesh)
    init_weights(layer, mesh, seed=0)
    x, mask = torch.randn(3, 6), torch.tensor([True, False, True])
    ids = torch.tensor([[1, 2], [-7, 99], [3, 4]])
    out = layer(x, mask, ids)
    assert out.dropped == 0 and out.counts_E.tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    with pytest.raises(RoutingError, match="8 experts"):
        layer(x, None, ids)
