"""Decoding: few tokens, fewer than ranks, ranks without any; and the dispatcher of fixed shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spmd_moe import (
    DP,
    SWIGLU,
    TP,
    AllToAll,
    ConfigError,
    Dispatcher,
    FixedCapacity,
    I,
    Kind,
    MeshError,
    MoE,
    MoEConfig,
    MoEMesh,
    R,
    RouterConfig,
    S,
    TorchGroupedMM,
    expert_load,
    init_weights,
)
from spmd_moe.check.signatures import signatures
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.experts import experts_ffn
from spmd_moe.layer.grouped_ffn import Weights
from spmd_moe.layer.grouped_matmul import GroupedMatmul, LoopedMatmul, Masked
from tests.bench.layer import grad_of
from tests.support.dispatchers import SHARDED
from tests.support.layer_cases import VARIANTS, case, layouts
from tests.support.layer_layouts import Case, Layout
from tests.support.layer_runs import build, compare, run_rank
from tests.support.simulated_ranks import fake_world
from tests.support.workers import run

LAYOUTS = [
    *(Layout(), Layout(dp=2, ep=2), Layout(tp=2, etp=2), Layout(dp=4, ep=2)),
    Layout(tp=4, ep=4),
    Layout(dp=2, tp=2, ep=2, etp=2),
    Layout(cp=2, tp=2, etp=4),
]
FEW = [("1", "even"), ("n-1", "ragged"), ("n+1", "last"), ("0", "even")]


def decoding(layout: Layout, variant: str, tokens: str, spread: str, dispatcher: str) -> Case:
    """Tokens that are whole on tp, as decoding has them."""
    choice: dict[str, Any] = {
        "boundary": (R, R),
        "dispatcher": dispatcher,
        "tokens": tokens,
        "spread": spread,
        "batch": 1,
        "variant": variant,
    }
    return case(layout, choice)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fixed_shapes_give_what_one_process_gives(layout: Layout, variant: str) -> None:
    """Output, counts and every gradient; the first variant under the strict checker.

    Fewer tokens than ranks and more take turns: each variant and each layout sees both.
    """
    turn = list(VARIANTS).index(variant) + LAYOUTS.index(layout)
    tokens, spread = (FEW[1], ("2n+3", "ragged"))[turn % 2]
    this = decoding(layout, variant, tokens, spread, "fixed")
    typed = variant == "plain" and layout.world > 1
    with signatures({"spmd_moe"}) if typed else nullcontext():
        by_rank = threaded(layout.world, run_rank, this, typed)
    compare(this, by_rank)


def decoded(this: Case) -> Tensor:
    """Without autograd, what this rank gets; the same as in training."""
    rank, layer = dist.get_rank(), build(this).eval()
    given = (this.x(rank), this.mask(rank), this.expert_ids(rank))
    with torch.no_grad():
        y: Tensor = layer(*given).hidden
    with_autograd: Tensor = layer(*given).hidden
    assert not y.requires_grad and torch.equal(y, with_autograd.detach())
    return y


@pytest.mark.parametrize("few", FEW, ids=" ".join)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_dispatchers_decode_alike(layout: Layout, few: tuple[str, str]) -> None:
    """Two variants of the layer take turns: each layout and each number of tokens sees both."""
    variant = ("plain", "masked, late, biases")[(LAYOUTS.index(layout) + FEW.index(few)) % 2]
    results = []
    for name in ("", *SHARDED):
        results.append(threaded(layout.world, decoded, decoding(layout, variant, *few, name)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.gloo
@pytest.mark.parametrize("dispatcher", ["", "fixed"])
def test_decoding_on_real_processes(dispatcher: str) -> None:
    for layout in (Layout(dp=2, tp=2, ep=2, etp=2), Layout(dp=4, ep=4)):
        for tokens, spread in FEW[:3]:
            this = decoding(layout, "plain", tokens, spread, dispatcher)
            compare(this, run(4, run_rank, this))


def test_there_are_layouts_of_every_shape() -> None:
    assert set(LAYOUTS) <= {layout for world in (1, 2, 4) for layout in layouts(world)}


# --- overflow -----------------------------------------------------------------------------------

CONFIG = MoEConfig(8, 16, RouterConfig(4, 2), src=R, dst=R)


def overflowing(room: int) -> tuple[list[float], int, int]:
    """Three tokens on each rank of dp, all to experts 0 and 1, of which each has its own rank."""
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    layer = MoE(replace(CONFIG, router=RouterConfig(2, 2)), mesh, FixedCapacity(mesh, 2, room))
    whole = MoE(replace(CONFIG, router=RouterConfig(2, 2)), mesh, AllToAll(mesh, 2))
    for each in (layer, whole):
        init_weights(each, mesh, seed=0, std=0.5)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(mesh[DP].rank))
    out, want = layer(x), whole(x)
    off = (out.hidden - want.hidden).abs().amax(1)
    load = expert_load(out, mesh)
    assert torch.equal(out.counts_E, want.counts_E)
    out.hidden.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    return off.tolist(), int(out.dropped), int(load.dropped)


def test_what_finds_no_room_is_counted_and_the_rest_is_right() -> None:
    for room in (1, 2, 3, 5):
        for off, dropped, over_all in threaded(2, overflowing, room):
            lost = max(3 - room, 0)
            assert dropped == 2 * lost and over_all == 4 * lost  # two choices of each such token
            assert [value < 1e-5 for value in off] == [token < room for token in range(3)]


def masked_choices() -> tuple[int, list[float]]:
    """Tokens that are masked take no room."""
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    layer = MoE(CONFIG, mesh, FixedCapacity(mesh, 4, 2))
    init_weights(layer, mesh, seed=0, std=0.5)
    mask = torch.tensor([False, True, False, False])
    out = layer(torch.ones(4, 8), mask)
    return int(out.dropped), out.hidden.abs().sum(1).tolist()


def test_masked_tokens_take_no_room() -> None:
    for dropped, sizes in threaded(2, masked_choices):
        assert dropped == 0 and [size > 0 for size in sizes] == [False, True, False, False]


# --- nothing is read by the host ------------------------------------------------------------------

READS = ("_local_scalar_dense", "::nonzero", "masked_select", "unique", "repeat_interleave.Tensor")
METHODS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class HostReadError(Exception):
    pass


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Refuses what makes the host wait for a device, and shapes that depend on data."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            name = func.name()
            if any(read in name for read in READS) or name.startswith("spmd_moe::"):
                raise HostReadError(name)
            return func(*args, **(kwargs or {}))

    class RefuseMethods(TorchFunctionMode):
        """On a CPU some reads come to no operator."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if getattr(func, "__name__", "") in METHODS:
                raise HostReadError(func.__name__)
            return func(*args, **(kwargs or {}))

    with Refuse(), RefuseMethods():  # type: ignore[no-untyped-call]  # torch does not type them
        yield


def made(
    fixed: bool, matmul: GroupedMatmul | None = None, **degrees: int
) -> tuple[MoE, Tensor, Tensor]:
    mesh = MoEMesh.init("cpu", **degrees)
    chosen: Dispatcher[Any] = FixedCapacity(mesh, 4, 8) if fixed else AllToAll(mesh, 4)
    layer = MoE(replace(CONFIG, bias=True), mesh, chosen, matmul=matmul).eval()
    init_weights(layer, mesh, seed=0)
    return layer, torch.ones(4, 8), torch.tensor([True, False, True, True])


def watched(fixed: bool, masked: bool, matmul: Masked | None = None) -> str:
    layer, x, mask = made(fixed, matmul, dp=2, tp=2, ep=2, etp=2)
    x = x.clone().requires_grad_()
    try:
        with no_host_reads():
            layer(x, mask if masked else None).hidden.sum().backward()
    except HostReadError as error:
        return str(error)
    return ""


def made_alone(matmul: LoopedMatmul) -> None:
    """Experts that read their counts."""
    config = SWIGLU, matmul
    weights = Weights(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    counts = torch.ones(1, dtype=torch.int64)
    experts_ffn(torch.ones(1, 2), counts, weights, None, None, *config)


@pytest.mark.parametrize("masked", [False, True])
def test_fixed_shapes_need_no_host(masked: bool) -> None:
    assert threaded(4, watched, True, masked) == [""] * 4


@pytest.mark.gloo
def test_fixed_shapes_need_no_host_on_real_processes() -> None:
    assert run(4, watched, True, True) == [""] * 4


@pytest.mark.gloo
def test_the_other_dispatcher_reads_sizes() -> None:
    """So the test above can fail: sizes are read, and so are counts by what computes by expert."""
    assert run(4, watched, False, False, Masked()) == ["tolist"] * 4
    with no_host_reads():
        for read in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.nonzero, bool):
            with pytest.raises(HostReadError, match=r"tolist|item|nonzero|bool"):
                read(torch.ones(1))
        with pytest.raises(HostReadError, match="cpu"):
            made_alone(LoopedMatmul())


def test_fixed_shapes_are_known_without_values() -> None:
    """Under fake tensors there are no values: any shape that depends on one is an error."""
    with fake_world(4):
        layer, x, mask = made(True, dp=2, tp=2, ep=2, etp=2)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            out = layer(mode.from_tensor(x), mode.from_tensor(mask))
        assert tuple(out.hidden.shape) == (4, 8) and tuple(out.dropped.shape) == ()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_with_fixed_shapes_the_layer_is_one_graph() -> None:
    with fake_world(2):
        layer, x, mask = made(True, tp=2, ep=2)
        with torch.no_grad():
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            assert tuple(compiled(x, mask).hidden.shape) == (4, 8)


# --- what is chosen, and what is refused ----------------------------------------------------------


def test_rows_that_the_host_would_have_to_count_are_refused() -> None:
    with fake_world(2):
        mesh = MoEMesh.init("cpu", tp=2, ep=2)
        config = MoEConfig(8, 16, RouterConfig(4, 2), dst=R)
        with pytest.raises(ConfigError, match=r"FixedCapacity, and tokens that are S\(0\)"):
            MoE(config, mesh, FixedCapacity(mesh, 4, 8))
        assert mesh[TP].size == 2


def other_room() -> str:
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    try:
        FixedCapacity(mesh, 4, 3 + mesh[DP].rank)
    except MeshError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.gloo
def test_ranks_with_another_room_are_told_at_once() -> None:
    for text in run(2, other_room):
        assert text.startswith("FixedCapacity: ") and "rows_per_rank=3 on ranks [0]" in text


# --- the matmul that skips padding ----------------------------------------------------------------


class Spoiling:
    """A grouped matmul that leaves anything in rows of no expert and in experts without rows."""

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        y_RB = Masked().rows(x_RA, w_eAB, ends_e)
        y_RB[int(ends_e[-1]) :] = torch.nan
        return y_RB

    def outer(self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor) -> Tensor:
        dw_eBA = Masked().outer(dy_RB, x_RA, ends_e)
        dw_eBA[1::2] = torch.nan
        return dw_eBA


def test_rows_of_no_expert_become_zero() -> None:
    mesh = MoEMesh.single()
    layer = MoE(replace(CONFIG, bias=True), mesh, matmul=Spoiling())
    init_weights(layer, mesh, seed=0, std=0.5)
    x = torch.ones(6, 8, requires_grad=True)
    y = layer.experts(x, torch.tensor([1, 0, 2, 0]), padded=True)
    y.sum().backward()
    assert x.grad is not None
    for rows in (y, x.grad):
        assert (rows[:3].abs().sum(1) > 0).all() and not rows[3:].any()
    for grad in map(grad_of, layer.experts.parameters()):
        assert grad[::2].any() and not grad[1::2].any()


@pytest.mark.parametrize("matmul", [Masked(), TorchGroupedMM(), LoopedMatmul()], ids=str)
def test_rows_of_no_expert_may_be_nan(matmul: GroupedMatmul) -> None:
    """What stands in padding reaches no value and no gradient."""
    mesh = MoEMesh.single()
    experts = MoE(replace(CONFIG, bias=True), mesh, matmul=matmul).experts
    init_weights(experts, mesh, seed=0, std=0.5)
    counts, results = torch.tensor([1, 0, 2, 0]), []
    for rows in (3, 6):
        x, scores = torch.full((rows, 8), torch.nan), torch.full((rows,), torch.nan)
        x[:3], scores[:3] = torch.arange(24.0).view(3, 8) / 24, torch.tensor([0.5, 0.25, 2.0])
        experts.zero_grad()
        leaves = x.requires_grad_(), scores.requires_grad_()
        y = experts(x, counts, scores, padded=rows > 3)
        y[:3].square().sum().backward()
        found = [y.detach(), *(grad_of(leaf) for leaf in leaves)]
        assert all(not t[3:].any() for t in found)
        results.append([t[:3] for t in found] + [grad_of(p) for p in experts.parameters()])
    for padded, plain in zip(results[1], results[0], strict=True):
        assert plain.any()
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


def with_grouped_mm() -> float:
    """How far torch's grouped matmul is from the masked one; neither reads anything."""
    results = []
    for matmul in (Masked(), TorchGroupedMM()):
        layer, x, mask = made(True, matmul, dp=2, tp=2, ep=2, etp=2)
        init_weights(layer, layer.mesh, seed=0, std=0.5)
        with no_host_reads(), torch.no_grad():
            results.append(layer(x, mask).hidden)
    assert results[0].any()
    return float((results[0] - results[1]).abs().max())


@pytest.mark.gloo
def test_grouped_and_masked_agree() -> None:
    assert max(run(4, with_grouped_mm)) < 1e-5


def left_over(src: Kind, dst: Kind) -> list[int]:
    """Collectives that torch still keeps after unread outputs."""
    mesh = MoEMesh.init("cpu", tp=2, ep=2)
    layer = MoE(replace(CONFIG, src=src, dst=dst, balance="batch"), mesh)
    init_weights(layer, mesh, seed=0)
    x, kept = torch.ones(4, CONFIG.dim), []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            layer(x)
        kept.append(_get_work_registry_size())
    layer.requires_grad_(False)(x)
    return [*kept, _get_work_registry_size()]


@pytest.mark.gloo
@pytest.mark.parametrize(("src", "dst"), [(R, R), (I, I), (S(0), R), (R, S(0))], ids=str)
def test_nothing_is_kept_of_outputs_that_nobody_reads(src: Kind, dst: Kind) -> None:
    assert run(2, left_over, src, dst) == [[0, 0, 0]] * 2
