"""Items on one device: matmuls, waits, graphs, compiled scores, repeats, time beside peers."""

# Shape letters in this file:
#   T  tokens    D  model width    E  experts    K  experts per token    R  rows    A, B  widths

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spmd_moe import (
    AllGather,
    AllToAll,
    Dispatcher,
    FixedCapacity,
    Local,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    init_weights,
)
from spmd_moe.layer.grouped_matmul import LoopedMatmul, RowGroups, TorchGroupedMM
from tests.bench.gpu.run_items import NotHereError
from tests.bench.peers.layers import WIDE, layers
from tests.bench.peers.measure import forward, step
from tests.support.pretended_device import on_device, pretended_device, to_device

E, K, D, F = 8, 2, 64, 128
DISPATCHERS: dict[str, Callable[[MoEMesh], Dispatcher[Any]]] = {
    "Local": Local,
    "FixedCapacity": lambda mesh: FixedCapacity(mesh, E, 64 * K),
    "AllToAll": lambda mesh: AllToAll(mesh, E),
    "AllGather": lambda mesh: AllGather(mesh, E),
}


def built(device: str, name: str = "Local", dtype: torch.dtype = torch.bfloat16) -> MoE:
    mesh = MoEMesh.single(device)
    layer = MoE(MoEConfig(D, F, RouterConfig(E, K)), mesh, DISPATCHERS[name](mesh))
    init_weights(layer, mesh, seed=0)
    return layer.to(device, dtype)


def drawn(device: str, number: int, seed: int = 1) -> Tensor:
    x = torch.randn(number, D, generator=torch.Generator().manual_seed(seed))
    return x.to(device, torch.bfloat16)


def grouped_matmul(device: str) -> str:
    """Empty, tiny and large groups, in memory that held NaN, compared with a float32 loop."""
    counts = torch.tensor([0, 1, 7, 0, 300, 16, 0, 2], device=device)
    rows, worst = int(counts.sum()), 0.0
    draw = torch.Generator().manual_seed(0)
    x_RA, dy_RB, w_eBA = (
        torch.randn(*shape, generator=draw).to(device, torch.bfloat16)
        for shape in ((rows, D), (rows, F), (len(counts), F, D))
    )
    for _ in range(3):
        _dirty(device)
        fast = _products(RowGroups.of(TorchGroupedMM(), counts), x_RA, dy_RB, w_eBA)
        loop = RowGroups.of(LoopedMatmul(), counts)
        slow = _products(loop, x_RA.float(), dy_RB.float(), w_eBA.float())
        for a, b in zip(fast, slow, strict=True):
            if not a.isfinite().all():
                raise ArithmeticError("a result is not finite")
            worst = max(worst, float((a.float() - b).norm() / b.norm()))
        if fast[2][counts == 0].any():
            raise ArithmeticError("the gradient of an expert without rows is not zero")
    if worst > 0.01:
        raise ArithmeticError(f"relative error {worst:.1e}")
    return f"groups of 0 to 300 rows: relative error {worst:.1e}, zeros without rows"


def _products(groups: RowGroups, x: Tensor, dy: Tensor, w: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [groups.linear(x, w), groups.rows(dy, w), groups.outer(dy, x, w.dtype)]


def _dirty(device: str) -> None:
    """Memory that the allocator hands out next holds NaN."""
    held = [torch.full((2**n,), torch.nan, device=device) for n in range(4, 22)]
    del held


def waits(device: str) -> str:
    """`set_sync_debug_mode`: an error if a wait is not allowed, otherwise counts."""
    found = {name: _waits_of(name, device) for name in DISPATCHERS}
    wrong = [name for name in ("Local", "FixedCapacity") if found[name]]
    if wrong:
        raise RuntimeError(f"the host waits in {', '.join(wrong)}: {found}")
    by = "" if device == "cuda" else " (pretended device)"
    return f"{', '.join(f'{name} {n}' for name, n in found.items())}{by}"


def _waits_of(name: str, device: str) -> int:
    if device != "cuda":
        layer = built("cpu", name)
        with pretended_device() as log:
            to_device(layer)
            there = on_device(drawn("cpu", 64), requires_grad=True)
            torch.autograd.backward(layer(there).hidden.float().sum())
            return len(log.take())
    layer, x = built(device, name), drawn(device, 64).requires_grad_()
    layer(x).hidden.float().sum().backward()  # one-time work: handles, workspaces
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        layer(x).hidden.float().sum().backward()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in told)


def cuda_graph(device: str) -> str:
    """Decoding captured once, replayed with other tokens, beside eager."""
    if device != "cuda":
        raise NotHereError("CUDA graphs need CUDA")
    layer, given = built(device, "FixedCapacity").eval(), drawn(device, 16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(given).hidden
        for seed in (2, 3, 4):
            other = drawn(device, 16, seed)
            given.copy_(other)
            graph.replay()
            torch.testing.assert_close(out, layer(other).hidden, rtol=0, atol=0)
    return "captured; 3 replays with other tokens are equal to eager"


def compiled_scores(device: str) -> str:
    """Inductor must not change the bits of float32 scores, even next to bfloat16 rows."""
    layer = built(device, "FixedCapacity").eval()
    x = drawn(device, 64)
    routing = layer.router(x)

    def arrive(x_TD: Tensor, scores_TK: Tensor) -> Tensor:
        scores_R = layer.dispatcher.dispatch(x_TD, scores_TK, routing)[0].scores_R
        assert scores_R is not None
        return scores_R

    bits = (0x3E05FF80 + torch.arange(64 * K, dtype=torch.int32)).to(device)  # NaN as bfloat16
    scores = bits.view(torch.float32).view(64, K)
    with torch.no_grad():
        eager, compiled = arrive(x, scores), torch.compile(arrive)(x, scores)
    changed = int((eager.view(torch.int32) != compiled.view(torch.int32)).sum())
    if changed:
        raise ArithmeticError(f"{changed} of {eager.numel()} scores changed")
    return f"{eager.numel()} scores are equal to the bit"


def deterministic(device: str) -> str:
    """Deterministic mode raises no error, and five runs are bitwise equal."""
    torch.use_deterministic_algorithms(True)
    for name in DISPATCHERS:
        layer, x = built(device, name), drawn(device, 64).requires_grad_()
        runs = []
        for _ in range(5):
            layer.zero_grad()
            x.grad = None
            y = layer(x).hidden
            y.backward(torch.ones_like(y))
            found = (y, x.grad, *(p.grad for p in layer.parameters()))
            runs.append([t.detach().clone() for t in found if t is not None])
        for run in runs[1:]:
            if not all(map(torch.equal, run, runs[0])):
                raise ArithmeticError(f"{name}: a repeat differs")
    return f"five repeats are equal to the bit with {', '.join(DISPATCHERS)}"


def beside_peers(device: str) -> str:
    """Milliseconds, kernels and synchronizations of a training step, and of a forward."""
    if device != "cuda":
        raise NotHereError("on CPUs, python -m tests.bench.peers does this")
    found, missing = layers(WIDE, torch.bfloat16)
    said = [f"without {name}" for name in missing]
    for layer in found:
        layer.module.to(device)
        x = torch.randn(2048, WIDE.dim, device=device, dtype=torch.bfloat16).requires_grad_()
        dy = torch.randn_like(x)
        for kind, run in (
            ("forward", partial(forward, layer, x)),
            ("step", partial(step, layer, x, dy)),
        ):
            layer.module.train(kind == "step")
            kernels, reads = _profiled(run)
            said.append(
                f"{layer.name} {kind} {_milliseconds(run):.2f} ms, {kernels} kernels, {reads} reads"
            )
    return "; ".join(said)


def _milliseconds(run: Callable[[], object]) -> float:
    for _ in range(5):
        run()
    taken = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(float(begin.elapsed_time(end)))
    return statistics.median(taken)


def _profiled(run: Callable[[], object]) -> tuple[int, int]:
    """Kernels, and copies to the host."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    copies = sum("Memcpy DtoH" in name for name in names)
    kernels = sum(not name.startswith(("Memcpy", "Memset", "cuda", "cu", "Lazy")) for name in names)
    return kernels, copies
