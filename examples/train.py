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

import argparse
import json
import math
import os
import signal
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from train_model import Model, build, type_check
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
    Router,
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
)
from spmd_moe.check import Layout

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
RUNS = Path("runs")

# --- settings ---------------------------------------------------------------------------------


def option(default: Any, text: str, low: float = -math.inf, high: float = math.inf) -> Any:
    return field(default=default, metadata={"text": text, "low": low, "high": high})


@dataclass(frozen=True)
class Options:
    """Every field is an option of the command line."""

    steps: int = option(120, "optimizer steps in all, those before a resume counted", 1)
    batch: int = option(8, "sequences in a batch, of all ranks together", 1)
    length: int = option(128, "bytes in a sequence", 2)
    width: int = option(64, "of a token", 1)
    hidden: int = option(96, "width inside an expert", 1)
    layers: int = option(3, "blocks of attention and experts", 1)
    heads: int = option(4, "of attention", 1)
    experts: int = option(8, "in each layer", 1)
    top_k: int = option(2, "experts that a token goes to", 1)
    rate: float = option(3e-3, "learning rate, after the warm-up", 0, 1)
    warmup: int = option(20, "steps until the learning rate is reached", 0)
    decay: float = option(0.1, "weight decay", 0, 1)
    clip: float = option(1.0, "largest norm of the gradient", 1e-6)
    bias_rate: float = option(1e-3, "of the selection bias, which evens out the experts", 0, 1)
    seed: int = option(0, "of initial values and batches", 0, 2**31)
    double: bool = option(False, "compute in float64: layouts then differ by rounding alone")
    megabytes: float = option(4.0, "of source to train on", 0.01, 1000)
    tp: int = option(0, "ranks of tensor parallelism; 0: two, if the number of ranks is even", 0)
    ep: int = option(0, "ranks that share out the experts; 0: as many as can", 0)
    etp: int = option(1, "ranks that share each expert", 1)
    fsdp: bool = option(False, "cut parameters over the ranks that share their gradients (FSDP2)")
    check: bool = option(True, "type-check the model first")
    every: int = option(10, "steps between lines of progress", 1)
    save: int = option(100, "steps between checkpoints", 1)
    out: str = option("", "folder of the run; by itself the next free number in runs/")
    resume: bool = option(False, "go on with the run in --out, by itself the newest in runs/")

    def layout(self) -> Layout:
        """The degrees, with a number in place of each 0."""
        tp = self.tp or (2 if WORLD % 2 == 0 else 1)
        ep = self.ep or math.gcd(max(1, WORLD // self.etp), self.experts)
        return Layout(dp=max(1, WORLD // tp), tp=tp, ep=ep, etp=self.etp)


# What a run is; the rest may change when it is resumed.
FREE = ("steps", "tp", "ep", "etp", "fsdp", "check", "every", "save", "out", "resume")


def refuse(text: object) -> NoReturn:
    """One line, by one rank, and the exit status of a wrong command line."""
    if RANK == 0:
        print(f"train.py: {str(text).splitlines()[0]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


def options(words: list[str]) -> Options:
    """From the command line; when resumed, what it leaves out is as it was."""
    parser = Parser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(Options):
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["text"]
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            shown = "" if f.default == "" else f" ({f.default})"
            parser.add_argument(flag, type=type(f.default), help=text + shown)
    given = vars(parser.parse_args(words))
    chosen = Options(**given)
    return check(resumed(chosen, given) if chosen.resume else chosen)


def check(o: Options) -> Options:
    """Refuse what cannot be, before anything is written or another rank is waited for."""
    for f in fields(Options):
        value, low, high = getattr(o, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:
            limits = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            refuse(f"--{f.name.replace('_', '-')} is {value}; it must be {limits}")
    at = o.layout()
    ranks = f"of {WORLD} rank{'s' if WORLD > 1 else ''}"
    for wrong, text in (
        (o.width % o.heads, f"--width {o.width} is not a multiple of --heads {o.heads}"),
        (o.top_k > o.experts, f"--top-k is {o.top_k}, but there are --experts {o.experts}"),
        (WORLD % at.tp, f"--tp {at.tp} does not divide the number {ranks}"),
        (WORLD % (at.ep * at.etp), f"--ep {at.ep} x --etp {at.etp} does not divide that {ranks}"),
        (o.experts % at.ep, f"--experts {o.experts} is not a multiple of --ep {at.ep}"),
        (o.hidden % at.etp, f"--hidden {o.hidden} is not a multiple of --etp {at.etp}"),
        (o.batch < at.dp, f"--batch is {o.batch}, fewer than the {at.dp} ranks of dp"),
        (o.fsdp and "RANK" not in os.environ, "--fsdp needs ranks: start this under torchrun"),
    ):
        if wrong:
            refuse(text)
    return o


def resumed(chosen: Options, given: dict[str, Any]) -> Options:
    """The settings of the run, but for those that are given now."""
    numbered = sorted(p for p in RUNS.glob("[0-9][0-9][0-9]") if (p / "options.json").exists())
    folder = Path(chosen.out) if chosen.out else (numbered[-1] if numbered else RUNS)
    try:
        was = Options(**json.loads((folder / "options.json").read_text()))
    except (OSError, ValueError, TypeError):
        refuse(f"--resume, but there is no run in {str(folder)!r}")
    for name, value in given.items():
        if name not in FREE and value != getattr(was, name):
            refuse(f"--{name.replace('_', '-')} is {value}, but the run has {getattr(was, name)}")
    return replace(was, **given | {"out": str(folder)})


def claimed(o: Options) -> Path:
    """The folder of this run, made; with its settings in it."""
    folder = Path(o.out)
    try:
        if o.out:
            folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while not o.out:
            folder = RUNS / f"{number:03}"
            number += 1
            if not folder.exists():
                folder.mkdir(parents=True)
                break
        if not o.resume and any(folder.iterdir()):
            refuse(f"{str(folder)!r} is not empty: --resume goes on with the run in it")
        new = folder / "options.json.part"  # replaced at once: another rank may be reading it
        new.write_text(json.dumps(asdict(replace(o, resume=False)), indent=2))
        new.replace(folder / "options.json")
    except OSError as error:
        refuse(f"{str(folder)!r} cannot be written: {error.strerror}")
    return folder


# --- ranks and data ---------------------------------------------------------------------------


def join(o: Options, folder: Path) -> tuple[MoEMesh, Path]:
    """All ranks that torchrun started, or this process alone; and the folder that rank 0 made."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ:
        return MoEMesh.single(device), folder
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    names = [str(folder)]
    dist.broadcast_object_list(names)
    return o.layout().mesh(device), Path(names[0])


def source(o: Options) -> Tensor:
    """The standard library's modules, one after the other."""
    folder, text = Path(sysconfig.get_path("stdlib")), bytearray()
    for path in sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts):
        text += path.read_bytes()
        if len(text) >= o.megabytes * 1e6:
            break
    if len(text) <= o.length:
        refuse(f"--length is {o.length}, but there are {len(text)} bytes of source")
    return torch.frombuffer(text[: int(o.megabytes * 1e6)], dtype=torch.uint8)


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
    """Set by Ctrl-C, or by whoever ends the job; the step in which it comes is finished."""

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
        path.write_text("".join(kept))  # steps after the checkpoint are done anew
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
    metrics, stop = Metrics(folder, done), Stop()
    before, asked, saved = time.perf_counter(), False, done
    for step in range(done, o.steps):
        bytes_BL = batch(text, step, o, mesh, device)
        loss, norm, outs = one_step(model, optimizer, bytes_BL, step, o)
        loads = [expert_load(out, mesh) for out in outs]
        value, asked = told(loss, stop, mesh)
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
            save_checkpoint(path, model, mesh, optimizer, {"step": done, "data": checksum(text)})
            saved = done
        if asked:
            say(f"stopped after step {done}; go on: --resume --out {folder}")
            break
    metrics.close()
    say(f"the checkpoint of step {saved} is in {folder / 'checkpoints'}")


def main(words: list[str]) -> None:
    o = options(words)
    text = source(o)
    folder = claimed(o) if RANK == 0 else Path()
    if o.check and RANK == 0:  # before there are other ranks: it makes a small world of its own
        report = type_check([o.layout()], tokens=(0, 6))
        say(f"types: {report.summary() if report.ok else report}")
        if not report.ok:
            raise SystemExit(1)
    try:
        mesh, folder = join(o, folder)
        names = ("width", "hidden", "layers", "heads", "length", "experts", "top_k", "seed")
        dtype = torch.float64 if o.double else torch.float32
        model = build(mesh, dtype=dtype, **{name: getattr(o, name) for name in names})
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        if o.fsdp:
            parallelize(model, mesh, blocks=model.blocks)
        say(f"{mesh}, {sum(p.numel() for p in model.parameters()):,} parameters on this rank")
        train(model, text, folder, o)
    except (CheckpointError, ConfigError, MeshError) as error:  # of settings or of the disk
        refuse(error)
    if RANK == 0:
        for path in draw(folder):
            say(f"wrote {path}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
