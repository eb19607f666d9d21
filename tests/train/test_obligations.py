"""One row for each parameter, and what walks the rows: reductions, norms, clipping."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmd_moe import (
    MoEMesh,
    SpmdMoeError,
    clip_grad_norm_,
    declare_placements,
    obligations,
    reduce_gradients,
)
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.placement import (
    CP,
    DP,
    EDP,
    EP,
    ETP,
    TP,
    I,
    P,
    Placed,
    Placement,
    R,
    S,
    V,
    Whole,
)
from spmd_moe.train import gradients as gradients_file
from spmd_moe.train.obligations import Obligation
from tests.support.layer_cases import layouts
from tests.support.layer_layouts import Layout
from tests.support.models import Model, batch, build, mesh_of, part
from tests.support.simulated_ranks import fake_world
from tests.support.workers import run

LAYOUTS = [
    *chain.from_iterable(layouts(world) for world in (1, 2)),
    *list(layouts(4))[::5],
    *list(layouts(8))[::11],
]
NORMS = (2.0, 1.0, 3.0, math.inf)


def trained(layout: Layout, own_tokens: bool) -> tuple[Model, MoEMesh]:
    """A model after one backward."""
    mesh = mesh_of(layout)
    model = build(mesh, own_tokens)
    model(*batch(mesh, own_tokens)).backward()
    return model, mesh


def gradients(model: Model) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def whole(own_tokens: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What one process has, and the norms that torch itself takes of it."""
    grads = gradients(trained(Layout(), own_tokens)[0])
    return grads, [torch.nn.utils.get_total_norm(grads.values(), norm) for norm in NORMS]


def step(layout: Layout, own_tokens: bool, want: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    """How far this rank's reduced gradients are off, and its norms."""
    model, mesh = trained(layout, own_tokens)
    reduce_gradients(model, mesh)
    grads, off = gradients(model), 0.0
    for row in obligations(model, mesh):
        if not row.is_buffer:
            theirs = part(want[row.name], row.placement, mesh)
            off = max(off, float((grads[row.name] - theirs).abs().max()))
    return off, [clip_grad_norm_(model, mesh, math.inf, norm) for norm in NORMS]


@pytest.mark.parametrize("own_tokens", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_and_norms_are_those_of_one_process(layout: Layout, own_tokens: bool) -> None:
    want, norms = whole(own_tokens)
    assert min(float(grad.abs().max()) for grad in want.values()) > 1e-6, "nothing to compare"
    for off, got in threaded(layout.world, step, layout, own_tokens, want):
        assert off < 1e-12
        assert torch.allclose(torch.stack(got), torch.stack(norms), rtol=1e-12)


@pytest.mark.gloo
def test_on_real_processes() -> None:
    want, norms = whole(True)
    for off, got in run(4, step, Layout(dp=2, tp=2, ep=2, etp=2), True, want):
        assert off < 1e-12
        assert torch.allclose(torch.stack(got), torch.stack(norms), rtol=1e-12)


# --- rows ---------------------------------------------------------------------------------------


def rows_of(layout: Layout, own_tokens: bool = False) -> dict[str, Obligation]:
    with fake_world(layout.world):
        mesh = mesh_of(layout)
        return {row.name: row for row in obligations(build(mesh, own_tokens), mesh)}


def test_rows_follow_from_the_placement() -> None:
    rows = rows_of(Layout(dp=2, tp=4, ep=2, etp=2))
    w1, gate = rows["blocks.0.moe.experts.w1_eFD"], rows["blocks.0.moe.router.weight_ED"]
    assert w1.presentation == "expert" and gate.presentation == "dense"
    assert (w1.global_shape, w1.local_shape) == ((8, 16, 8), (4, 8, 8))
    assert (w1.reduce_axes, w1.norm_axes, w1.random_axes) == ((EDP,), (EP, ETP), (EP, ETP))
    assert (gate.reduce_axes, gate.norm_axes, gate.random_axes) == ((DP, CP), (), ())
    assert str(w1.stored) == "(Replicate(), Shard(dim=0), Shard(dim=1))"
    assert {row.divisor for row in rows.values()} == {1}
    seen = rows["blocks.1.moe.router.seen_E"]
    assert seen.is_buffer and seen.reduce_axes == () and seen.placement[TP] is P


def test_reduced_and_measured_axes_and_invariant_ones_are_all_axes() -> None:
    for own_tokens in (False, True):
        for row in rows_of(Layout(dp=2, tp=4, ep=2, etp=2), own_tokens).values():
            alike = tuple(k.role for k in row.placement if k.kind in (I, P))
            if not row.is_buffer:
                axes = sorted(str(r) for r in (*row.reduce_axes, *row.norm_axes, *alike))
                assert axes == sorted(str(k.role) for k in row.placement)


def test_the_table_is_readable() -> None:
    rows = obligations(build(MoEMesh.single(), False), MoEMesh.single())
    assert repr(rows) == str(rows)
    table = str(rows).splitlines()
    head = "name global local placement reduce div norm random stored"
    assert " ".join(table[0].split()) == head
    assert len(table) == 1 + len(rows)
    line = next(line for line in table if line.startswith("blocks.0.moe.experts.w2_eDF"))
    cells = "[8, 8, 16] [8, 8, 16] edp:R ep:S(0) etp:S(2) edp 1 ep etp ep etp R S(0) S(2)"
    assert " ".join(line.split()[1:]) == cells


def test_tied_parameters_are_one_row() -> None:
    model = build(MoEMesh.single(), False)
    model.head.weight = model.embedding.weight
    names = [row.name for row in obligations(model, MoEMesh.single())]
    assert "embedding.weight" in names and "head.weight" not in names


def test_the_table_is_made_once_and_anew_when_something_changed() -> None:
    mesh, model = MoEMesh.single(), build(MoEMesh.single(), False)
    table = obligations(model, mesh)
    assert obligations(model, mesh) is table
    assert obligations(model, MoEMesh.single()) is not table
    model.head.bias = nn.Parameter(torch.ones(3))
    assert {row.name: row for row in obligations(model, mesh)}["head.bias"].local_shape == (3,)
    with fake_world(4):  # of the same tensors
        wide = obligations(model, MoEMesh.init("cpu", dp=2, tp=2, ep=4))
    experts = {row.name: row for row in wide}["blocks.0.moe.experts.w1_eFD"]
    assert experts.global_shape == (32, 16, 8)


# --- gradients that are not there, or were reduced before ---------------------------------------


def partly_missing(layout: Layout) -> list[Tensor | None]:
    """The head's bias has a gradient on rank 0 only; its weight has none on any rank."""
    model, mesh = trained(layout, True)
    model.head.weight.grad = None
    if dist.get_rank() != 0:
        model.head.bias.grad = None
    reduce_gradients(model, mesh)
    return [model.head.weight.grad, model.head.bias.grad]


def test_a_gradient_of_some_ranks_is_had_by_all_and_of_none_by_none() -> None:
    by_rank = threaded(2, partly_missing, Layout(dp=2, ep=2))
    for weight, bias in by_rank:
        assert weight is None and bias is not None and bias.abs().sum() > 0
        assert torch.equal(bias, by_rank[0][1] if by_rank[0][1] is not None else torch.empty(0))


def in_small_buckets(layout: Layout, want: dict[str, Tensor]) -> float:
    return step(layout, True, want)[0]


def test_the_size_of_buckets_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_file, "BUCKET_BYTES", 600)
    want, _ = whole(True)
    assert max(threaded(4, in_small_buckets, Layout(dp=2, tp=2, ep=2), want)) < 1e-12


def after(first: str, then: str) -> list[str]:
    """What both say of gradients that were reduced, and to which something was done since."""
    model, mesh = trained(Layout(dp=2, ep=2), False)
    reduce_gradients(model, mesh)
    for done in first.split():
        if done == "backward":
            model(*batch(mesh, False)).backward()
        elif done == "grad":  # adds to no gradient
            torch.autograd.grad(model(*batch(mesh, False)), list(model.parameters()))
        elif done == "clip":
            clip_grad_norm_(model, mesh, 1e-3)
        elif done == "scale":
            torch._foreach_mul_(list(gradients(model).values()), 0.5)
        else:
            model.zero_grad(set_to_none=done == "none")
    try:
        reduce_gradients(model, mesh) if then == "reduce" else clip_grad_norm_(model, mesh, 1.0)
    except SpmdMoeError as error:
        return [str(error)]
    return []


AFTER = {
    "reduce": ["", "backward", "clip", "scale backward", "grad", "grad backward"],
    "clip": ["backward", "zero backward", "none backward", "clip backward", "none backward grad"],
}
FINE_AFTER = {
    "reduce": [
        *("zero", "zero backward", "none backward", "grad none backward"),
        *("backward zero backward", "zero backward grad backward"),
    ],
    "clip": ["", "clip", "scale", "grad", "zero", "none"],
}
SAID = {"reduce": "has been reduced before", "clip": "is still to be summed over dp"}


@pytest.mark.parametrize("then", AFTER)
def test_gradients_are_reduced_once_after_the_last_backward(then: str) -> None:
    for wrong, cases in ((True, AFTER), (False, FINE_AFTER)):
        for first in cases[then]:
            for said in threaded(2, after, first, then):
                assert [SAID[then] in text for text in said] == [True] * wrong, (first, said)


def unreduced(layout: Layout) -> None:
    model, mesh = trained(layout, False)
    with pytest.raises(SpmdMoeError, match="is still to be summed over dp"):
        clip_grad_norm_(model, mesh, 1.0)


def test_a_sum_that_is_not_taken_has_no_norm() -> None:
    threaded(2, unreduced, Layout(dp=2, ep=2))


class Parts(nn.Module):
    """A weight in parts over tp, and whole ones, of which one is empty."""

    part_D: Placed[Tensor, DP[R], CP[R], TP[S[0]]]
    empty_D: Whole
    whole_D: Whole

    def __init__(self) -> None:
        super().__init__()
        self.part_D = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))
        self.empty_D = nn.Parameter(torch.empty(0))
        self.whole_D = nn.Parameter(torch.ones(3))


def norms_of_parts() -> list[float]:
    """The part of rank 1 has no gradient."""
    mesh, model = MoEMesh.init("cpu", tp=2), Parts()
    loss = model.whole_D.sum() + model.empty_D.sum()
    (loss + model.part_D.square().sum() if mesh[TP].rank == 0 else loss).backward()
    reduce_gradients(model, mesh)
    norms = [clip_grad_norm_(model, mesh, math.inf, norm) for norm in (2.0, math.inf)]
    assert {norm.dtype for norm in norms} == {torch.float64}
    return [norm.item() for norm in norms]


def test_a_gradient_that_one_rank_has_not_is_zero_in_the_norm_of_all() -> None:
    """Each rank issues the same collectives, with any subset of gradients."""
    want = [pytest.approx(math.sqrt(2 * 4**2 + 3 * 2**2)), 4.0]
    assert threaded(2, norms_of_parts) == [want, want]


# --- clipping -----------------------------------------------------------------------------------


def clipped(max_norm: float, foreach: bool | None, dtype: torch.dtype) -> tuple[Model, Tensor]:
    mesh = MoEMesh.single()
    model = trained(Layout(), False)[0].to(dtype)
    return model, clip_grad_norm_(model, mesh, max_norm, foreach=foreach)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_it_scales_as_torch_does(max_norm: float, foreach: bool | None) -> None:
    ours, total = clipped(max_norm, foreach, torch.float64)
    theirs = trained(Layout(), False)[0]
    assert torch.allclose(total, torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    for (name, got), want in zip(gradients(ours).items(), gradients(theirs).values(), strict=True):
        assert torch.allclose(got, want, rtol=1e-12), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_what_is_not_finite_is_treated_as_torch_does(value: float, norm_type: float) -> None:
    ours, theirs = (trained(Layout(), False)[0] for _ in range(2))
    for model in (ours, theirs):
        assert model.head.bias.grad is not None
        model.head.bias.grad[0] = value
    mesh = MoEMesh.single()
    with pytest.raises(RuntimeError, match="the norm of the gradients is not finite"):
        clip_grad_norm_(ours, mesh, 1.0, norm_type, error_if_nonfinite=True)
    got = clip_grad_norm_(ours, mesh, 1.0, norm_type)
    want = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0, norm_type)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    for name, grad in gradients(ours).items():
        assert torch.equal(grad.isnan(), gradients(theirs)[name].isnan()), name


def stage(layout: Layout, own_tokens: bool) -> tuple[float, float]:
    """Two stages of a pipeline, each a model of its own on one rank."""
    mesh = MoEMesh.single()
    model = build(mesh, own_tokens)
    model(*batch(mesh, own_tokens, step=dist.get_rank())).backward()
    alone = float(clip_grad_norm_(model, mesh, math.inf))
    return alone, float(clip_grad_norm_(model, mesh, math.inf, pipeline=dist.group.WORLD))


def test_the_stages_of_a_pipeline_have_one_norm() -> None:
    (a, both), (b, same) = threaded(2, stage, Layout(), False)
    assert a != b and both == same == pytest.approx(math.hypot(a, b), rel=1e-12)


def test_no_gradients_at_all() -> None:
    mesh = MoEMesh.single()
    assert clip_grad_norm_(nn.Sequential(), mesh, 1.0) == 0.0
    reduce_gradients(nn.Sequential(), mesh)


def test_kinds_that_say_nothing_of_the_whole_are_refused() -> None:
    model = nn.Linear(2, 2)
    declare_placements(model, {"*": Placement((DP[R], CP[R], TP[V]))})
    with pytest.raises(SpmdMoeError, match="tp:V does not say"):
        obligations(model, MoEMesh.single())
