"""Train a language model of bytes, with experts, on the source of Python's own standard library.

    torchrun --nproc-per-node 4 examples/train.py              # dp 2 x tp 2, experts over 4 ranks
    torchrun --nproc-per-node 4 examples/train.py --resume     # the newest run, from where it ended
    python examples/train.py                                   # one process, the same losses

On CPUs, or on GPUs where there are some. Ctrl-C ends a run after the step that it is in; what is
resumed then goes on as if nothing had been, to the bit. A run is a folder: its settings, metrics
(a line of JSON for each step), checkpoints, and a picture of the loss and of who used which expert.
"""

# Shape letters in this file:
#   B  sequences of this rank    L  length    E  experts

from __future__ import annotations

import json
import os
import signal
import sys
import sysconfig
import time
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from train_model import Model, build, type_check
from train_options import ATTEMPT, RANK, Options, claimed, options, refuse
from train_picture import draw

from spmd_moe import (
    DP,
    TP,
    CheckpointError,
    ConfigError,
    MeshError,
    MoEMesh,
    MoEOutput,
    P,
    R,
    ShardShape,
    clip_grad_norm_,
    expert_load,
    latest_checkpoint,
    load_checkpoint,
    parallelize,
    redistribute,
    reduce_gradients,
    save_checkpoint,
    update_selection_bias,
    watch_hangs,
)
from spmd_moe.layer.router import Router

# --- ranks and data ---------------------------------------------------------------------------


def join(o: Options, folder: Path) -> tuple[MoEMesh, Path]:
    """All ranks that torchrun started, or this process alone; and the folder that rank 0 made."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ:
        return MoEMesh.single(device), folder
    start_group("nccl" if device == "cuda" else "gloo")
    names = [str(folder)]
    dist.broadcast_object_list(names)
    return o.layout().mesh(device), Path(names[0])


def start_group(backend: str) -> None:
    """As `dist.init_process_group(backend)` does, but where torchrun starts the ranks again, it
    keeps its store: the addresses of ranks that are gone would be taken for those of this attempt.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {ATTEMPT}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def source(o: Options) -> Tensor:
    """The standard library's modules, one after the other."""
    folder, text = Path(sysconfig.get_path("stdlib")), bytearray()
    for path in sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts):
        text += path.read_bytes()
        if len(text) >= o.megabytes * 1e6:
            break
    text = text[: int(o.megabytes * 1e6)]
    if len(text) <= o.length:
        refuse(f"--length is {o.length}, but there are {len(text)} bytes of source")
    return torch.frombuffer(text, dtype=torch.uint8)


def checksum(text: Tensor) -> int:
    """So that a run is not resumed on other bytes than it began with."""
    return int((text.long() * torch.arange(1, len(text) + 1)).sum())


def batch(text: Tensor, step: int, o: Options, mesh: MoEMesh, device: torch.device) -> Tensor:
    """This rank's sequences. They depend on the step alone, so there is no place to remember."""
    drawn = torch.Generator().manual_seed(o.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - o.length, (o.batch, 1), generator=drawn)
    dp = mesh[DP]
    shape = ShardShape.even(o.batch, dp.size)
    own_BL = starts.narrow(0, shape.offsets[dp.rank], shape.sizes[dp.rank])
    return text[own_BL + torch.arange(o.length + 1)].long().to(device)


# --- training ---------------------------------------------------------------------------------


class Stop:
    """Set by Ctrl-C, or by the launcher when it ends the job; the current step is finished."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


@torch.no_grad()
def told(loss: Tensor, stop: Stop, mesh: MoEMesh) -> tuple[float, bool]:
    """The loss of all ranks, and whether any of them was asked to stop."""
    both = torch.stack([loss, torch.full_like(loss, float(stop.asked))])
    both = redistribute(both, mesh[DP], src=P, dst=R)  # the loss is the same on all ranks of tp
    asked = redistribute(both.narrow(0, 1, 1), mesh[TP], src=P, dst=R)
    return float(both[0]), bool(asked)


def one_step(
    model: Model, optimizer: torch.optim.Optimizer, bytes_BL: Tensor, step: int, o: Options
) -> tuple[Tensor, Tensor, list[MoEOutput]]:
    """Forward, backward, and a step of the optimizer: what a training loop repeats."""
    mesh = model.mesh
    tokens = o.batch * o.length  # of all ranks: the loss is divided once, by a global count
    loss, extra, outs = model(bytes_BL[:, :-1], bytes_BL[:, 1:], tokens)
    (loss + extra).backward()
    if not o.fsdp:
        reduce_gradients(model, mesh)
    norm = clip_grad_norm_(model, mesh, o.clip)
    for group in optimizer.param_groups:
        group["lr"] = o.rate * min(1.0, (step + 1) / max(1, o.warmup))
    optimizer.step()
    optimizer.zero_grad()
    update_selection_bias([m for m in model.modules() if isinstance(m, Router)], mesh, o.bias_rate)
    return loss, norm, outs


class Metrics:
    """A line of JSON for each step; TensorBoard too, where it is installed. Rank 0 writes."""

    def __init__(self, folder: Path, done: int) -> None:
        self.board: Any = None
        if RANK:
            return
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        path.write_text("".join(kept))  # steps after the checkpoint are done again
        self.file = path.open("a", buffering=1)
        if find_spec("tensorboard"):
            writer = import_module("torch.utils.tensorboard").SummaryWriter
            self.board = writer(str(folder), purge_step=done + 1)

    def write(self, line: dict[str, Any]) -> None:
        if RANK:
            return
        self.file.write(json.dumps(line) + "\n")
        for name in ("loss", "norm", "tokens_per_second", "balance") if self.board else ():
            self.board.add_scalar(name, line[name], line["step"])

    def close(self) -> None:
        for writer in (self.board, None if RANK else self.file):
            if writer is not None:
                writer.close()


def say(line: str) -> None:
    if RANK == 0:
        print(line, flush=True)


def train(model: Model, text: Tensor, folder: Path, o: Options) -> None:
    """From the latest checkpoint, if the run has one, to the last step or to Ctrl-C."""
    mesh, device = model.mesh, next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), o.rate, weight_decay=o.decay, fused=True)
    latest, extra = latest_checkpoint(folder / "checkpoints"), {"step": 0, "data": checksum(text)}
    if latest is not None:
        extra = load_checkpoint(latest, model, mesh, optimizer)
        say(f"resumed after step {extra['step']}")
    if extra["data"] != checksum(text):
        refuse(f"{str(folder)!r} was trained on another version of the standard library")
    done: int = extra["step"]
    if done >= o.steps:
        say(f"nothing is left to do: the run has {done} steps, and --steps is {o.steps}")
    metrics, stop = Metrics(folder, done), Stop()
    before, asked, saved = time.perf_counter(), False, done
    with watch_hangs(seconds=o.hang) as watch:
        for step in range(done, o.steps):
            bytes_BL = batch(text, step, o, mesh, device)
            loss, norm, outs = one_step(model, optimizer, bytes_BL, step, o)
            loads = [expert_load(out, mesh) for out in outs]
            value, asked = told(loss, stop, mesh)
            watch.step()
            now = time.perf_counter()
            speed, before, done = o.batch * o.length / (now - before), now, step + 1
            balance = max(float(load.max_over_mean) for load in loads)
            counts = [load.counts_E.tolist() for load in loads]
            line = {"step": done, "loss": value, "norm": float(norm), "balance": balance}
            metrics.write(line | {"tokens_per_second": round(speed), "counts": counts})
            if done == 1 or done % o.every == 0 or done == o.steps or asked:
                say(
                    f"step {done:>5}  loss {value:.4f}  {speed:>7.0f} tokens/s  "
                    f"busiest expert {balance:.2f} x the mean"
                )
            if done % o.save == 0 or done == o.steps or asked:
                path = folder / "checkpoints" / f"{done:06}"
                extra = {"step": done, "data": checksum(text)}
                with watch.pause():
                    save_checkpoint(path, model, mesh, optimizer, extra)
                saved = done
            if asked:
                say(f"stopped after step {done}; go on: --resume --out {folder}")
                break
    metrics.close()
    say(f"the checkpoint of step {saved} is in {folder / 'checkpoints'}")


def main(words: list[str]) -> None:
    o = options(words, __doc__)
    text = source(o)
    folder = claimed(o) if RANK == 0 else Path()
    if o.check and RANK == 0:  # before there are other ranks: it makes a small world of its own
        report = type_check([o.layout()], tokens=(0, 6))
        say(f"types: {report.summary() if report.ok else report}")
        if not report.ok:
            raise SystemExit(1)
    try:
        mesh, folder = join(o, folder)
        mesh.check_ranks_agree("options", asdict(replace(o, out="")) | {"source": checksum(text)})
        names = ("width", "hidden", "layers", "heads", "length", "experts", "top_k", "seed")
        dtype = torch.float64 if o.double else torch.float32
        model = build(mesh, dtype=dtype, **{name: getattr(o, name) for name in names})
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        count = sum(p.numel() for p in model.parameters())  # FSDP cuts them further
        say(f"{mesh}, {count:,} parameters on this rank{' before FSDP' if o.fsdp else ''}")
        if o.fsdp:
            parallelize(model, mesh, blocks=model.blocks)
        train(model, text, folder, o)
    except (CheckpointError, ConfigError, MeshError, OSError) as error:  # of settings or the disk
        refuse(error)
    except RuntimeError as error:
        # gloo has no error class for a peer that has ended; NCCL raises DistBackendError.
        if "gloo/transport" not in str(error) and not isinstance(error, dist.DistBackendError):
            raise
        why = "; ".join(getattr(error, "__notes__", []))  # added by watch_hangs
        gone = f"train.py: rank {RANK} ends because another rank has ended"
        raise SystemExit(f"{gone} ({why})" if why else gone) from None
    if RANK == 0:
        for path in draw(folder):
            say(f"wrote {path}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
