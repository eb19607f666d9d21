"""What each layer costs: counts on the meta device, waits of the host, kernels, and time."""

# Shape letters in this file:
#   T  tokens    D  model width

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final
from unittest import mock

import torch
from torch import Tensor

from tests.bench.peers.layers import Layer, Sizes, counts_of_ids, layers
from tests.support.operator_costs import counted, kept_bytes
from tests.support.pretended_device import on_device, pretended_device, to_device


@final
@dataclass(frozen=True)
class Count:
    """Of one layer: operators that move data, bytes that they move, bytes kept for backward."""

    operators: int
    moved: int
    kept: int

    def __str__(self) -> str:
        kept = f", {self.kept / 2**20:.1f} kept" if self.kept else ""
        return f"{self.operators}, {self.moved / 2**20:.0f} MiB{kept}"


def tokens(sizes: Sizes, number: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    x = torch.randn(number, sizes.dim, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(device).requires_grad_()


def step(layer: Layer, x: Tensor, dy: Tensor) -> None:
    """Forward and backward; gradients are new each time."""
    for leaf in (x, *layer.module.parameters()):
        leaf.grad = None
    layer.call(x).backward(dy)


def forward(layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.call(x)


def counts(found: list[Layer], x: Tensor, *, training: bool) -> dict[str, Count]:
    """The counts of layers whose weights, like `x`, are on the meta device."""
    made = dict[str, Count]()
    for layer in found:
        layer.module.train(training)
        kept = 0
        with counted() as costs:
            if training:
                step(layer, x, torch.empty_like(x))
            else:
                forward(layer, x)
        if training:
            with counted():  # whose grouped matmul takes float32
                kept = kept_bytes(layer.module, x, partial(layer.call, x))
        made[layer.name] = Count(len(costs.operators), costs.read + costs.written, kept)
    return made


def waits(sizes: Sizes) -> dict[str, int]:
    """Waits of the host in forward and backward, on a pretended GPU."""
    made = dict[str, int]()
    for layer in layers(sizes, torch.bfloat16)[0]:
        with pretended_device() as log, mock.patch.object(torch, "histc", counts_of_ids):
            to_device(layer.module)
            x = on_device(tokens(sizes, 8, torch.bfloat16), requires_grad=True)
            y = layer.call(x)
            torch.autograd.backward(y, on_device(torch.ones(y.shape, dtype=y.dtype)))
            made[layer.name] = len(log.take())
    return made


def kernels(layer: Layer, x: Tensor, *, training: bool) -> str:
    """Kernels that Inductor makes, and calls of others (matmuls, sorts), for the whole graph."""
    from torch._inductor import metrics
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    metrics.reset()
    layer.module.train(training)
    compiled = torch.compile(layer.call, fullgraph=True, dynamic=True)
    run: Callable[[], object] = (
        partial(_compiled_step, compiled, x) if training else partial(compiled, x)
    )
    with torch.set_grad_enabled(training):
        code: Any = run_and_get_code(run)[1]
    calls = sum(len(re.findall(r"(?:extern_kernels|torch\.ops)\.\S+\(", text)) for text in code)
    return f"{metrics.generated_kernel_count} + {calls}"


def _compiled_step(compiled: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = compiled(x)
    y.backward(torch.ones_like(y))


@final
@dataclass(frozen=True)
class Ratio:
    """Our time divided by that of a peer, for each turn: the quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


PATIENCE = 4.0  # seconds of one turn of all layers; above it nothing is measured


def ratios(found: list[Layer], x: Tensor, *, training: bool, seconds: float) -> dict[str, Ratio]:
    """CPU time beside each peer. All take turns, so that what disturbs one disturbs all."""
    dy, taken = torch.ones_like(x), dict[str, list[float]]()
    begun, turns = time.perf_counter(), 0
    while turns < 5 or time.perf_counter() - begun < seconds:
        for layer in found:
            layer.module.train(training)
            begin = time.process_time()
            step(layer, x, dy) if training else forward(layer, x)
            taken.setdefault(layer.name, []).append(time.process_time() - begin)
        turns += 1
        if turns == 1 and time.perf_counter() - begun > PATIENCE:
            return {}
    ours, *peers = taken
    made = dict[str, Ratio]()
    for peer in peers:
        pairs = zip(taken[ours][1:], taken[peer][1:], strict=True)  # the first turn warms up
        made[peer] = Ratio(*statistics.quantiles([a / b for a, b in pairs], n=4))
    return made
