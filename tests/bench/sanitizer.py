"""What the sanitizer costs: training steps without it, with it switched off, and at two rates.

python -m tests.bench.sanitizer

The four take turns, cycle by cycle, so that what else the machine does falls on all alike; shown
is the least disturbed cycle of each, by the clock.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
import torch.distributed as dist

from spmd_moe import (
    MoE,
    MoEConfig,
    MoEMesh,
    P,
    R,
    RouterConfig,
    init_weights,
    redistribute,
    sanitize,
)
from spmd_moe.core.placement import DENSE, EXPERT, placements_of
from tests.support.workers import run

WAYS: dict[str, float | None] = {"without": None, "off": 0.0, "1 in 10": 0.1, "every step": 1.0}
CYCLE, CYCLES = 10, 6


def train(layer: MoE, mesh: MoEMesh, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    layer(x).hidden.square().mean().backward()
    for module in layer.modules():
        declared = placements_of(type(module))
        for name, parameter in module.named_parameters(recurse=False):
            for role in (*DENSE, *EXPERT):
                if role in declared[name] and declared[name][role] is R:
                    assert parameter.grad is not None
                    parameter.grad = redistribute(parameter.grad, mesh[role], src=P, dst=R)
    optimizer.step()


def timed(degrees: dict[str, int], width: int, tokens: int) -> dict[str, float]:
    """Seconds of a step, in the fastest cycle."""
    mesh = MoEMesh.init("cpu", **degrees)
    layer = MoE(MoEConfig(width, 2 * width, RouterConfig(8, 2)), mesh)
    init_weights(layer, mesh, seed=0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4)
    x = torch.randn(tokens, width)
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for cycle in range(CYCLES + 1):
        for way, rate in WAYS.items():
            watch = nullcontext() if rate is None else sanitize(layer, mesh, rate)
            with watch:
                dist.barrier()
                start = time.perf_counter()
                for _ in range(CYCLE):
                    train(layer, mesh, optimizer, x)
                if cycle:  # the first one warms up
                    took[way].append((time.perf_counter() - start) / CYCLE)
    return {way: min(times) for way, times in took.items()}


def main() -> None:
    print("layout            width tokens " + "".join(f"{way:>14}" for way in WAYS))
    for degrees in ({"dp": 2}, {"dp": 2, "ep": 2}, {"tp": 2, "etp": 2}):
        for width, tokens in ((128, 128), (256, 512)):
            took = run(2, timed, degrees, width, tokens, timeout=600.0)[0]
            base = took["without"]
            cells = (f"{t * 1e3:7.1f}ms {t / base:.2f}x" for t in took.values())
            name = " ".join(f"{k} {v}" for k, v in degrees.items())
            print(f"{name:<17} {width:5} {tokens:6} " + "".join(f"{c:>14}" for c in cells))


if __name__ == "__main__":
    main()
