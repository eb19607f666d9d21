"""Items over ranks, by torchrun: NCCL on GPUs, gloo on CPUs. This file is what the ranks run.

torchrun --standalone --nproc-per-node=2 -m tests.bench.gpu.on_ranks start cpu
"""

# Shape letters in this file:
#   T  tokens    D  model width

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
from tests.bench.gpu.run_items import on_ranks
from tests.support.docs_blocks import ROOT

CONFIG = MoEConfig(64, 128, RouterConfig(8, top_k=2))


def world(device: str) -> int:
    """Ranks to start: all GPUs, at most 8 and a power of two, or two processes."""
    if device != "cuda":
        return 2
    count = min(8, torch.cuda.device_count())
    return 1 << (count.bit_length() - 1)


# --- what a rank runs -------------------------------------------------------------------------


def layer_on(mesh: MoEMesh, device: str) -> MoE:
    layer = MoE(CONFIG, mesh)
    init_weights(layer, mesh, seed=0)
    return layer.to(device)


def start(device: str) -> str:
    """The program does not call `torch.cuda.set_device`."""
    ranks = dist.get_world_size()
    mesh = MoEMesh.init(device, dp=ranks, ep=ranks)
    layer = layer_on(mesh, device)
    layer(torch.randn(8, 64, device=device)).hidden.sum().backward()
    mine = torch.cuda.current_device() if device == "cuda" else dist.get_rank()
    if mine != dist.get_rank() % max(1, torch.cuda.device_count() or ranks):
        raise RuntimeError(f"rank {dist.get_rank()} is on device {mine}")
    return f"{ranks} ranks, {dist.get_backend()}, each on its device"


def empty_ranks(device: str) -> str:
    """No rank has tokens; then one; then all but one: each compared with one process."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    layer = layer_on(MoEMesh.init(device, dp=ranks, ep=ranks), device)
    alone = layer_on(MoEMesh.single(device), device)
    for having in ((), (0,), tuple(range(1, ranks))):
        number = 5 if rank in having else 0
        x_TD = torch.randn(number, 64, generator=torch.Generator().manual_seed(rank)).to(device)
        ours, want = _outputs(layer, x_TD), _outputs(alone, x_TD)
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return f"{ranks} ranks: none with tokens, one, all but one; equal to one process"


def _outputs(layer: MoE, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD).hidden
    y_TD.square().sum().backward()
    assert x_TD.grad is not None
    return y_TD.detach(), x_TD.grad


PROGRAMS: dict[str, Callable[[str], str]] = {"start": start, "empty_ranks": empty_ranks}

# --- items ------------------------------------------------------------------------------------


def _launched(name: str, device: str) -> str:
    said = on_ranks(["-m", "tests.bench.gpu.on_ranks", name, device], world(device))
    return next(line[6:] for line in said.splitlines() if line.startswith("seen: "))


def started(device: str) -> str:
    return _launched("start", device)


def exchanges(device: str) -> str:
    return _launched("empty_ranks", device)


SMALL = "--layers 2 --width 32 --hidden 32 --length 32 --batch 8 --megabytes 0.5 --no-check"


def fsdp(device: str) -> str:
    """The loss of a few steps: FSDP2 with experts over all ranks, and one process."""
    ranks = world(device)
    steps = 10 if device == "cuda" else 2
    words = f"{SMALL} --steps {steps}"
    many, one = _losses(f"{words} --fsdp --tp 1", ranks), _losses(words, 0)
    off = max(abs(a - b) for a, b in zip(many, one, strict=True))
    if off > 2e-3:
        raise ArithmeticError(f"losses differ by {off:.1e} within {steps} steps")
    return f"{ranks} ranks, {steps} steps: losses within {off:.1e} of one process"


def training(device: str) -> str:
    """The example, with its own sizes on a GPU."""
    ranks = world(device)
    words = "--steps 200 --no-check" if device == "cuda" else f"{SMALL} --steps 5"
    losses = _losses(words, ranks)
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"{ranks} ranks, {len(losses)} steps: loss {losses[0]:.3f} to {losses[-1]:.3f}"


def _losses(words: str, ranks: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        on_ranks([str(ROOT / "examples" / "train.py"), *words.split(), "--out", str(out)], ranks)
        return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def main() -> None:
    name, device = sys.argv[1:]
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    text = PROGRAMS[name](device)
    if dist.get_rank() == 0:
        print(f"seen: {text}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
