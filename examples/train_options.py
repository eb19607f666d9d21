"""The settings of examples/train.py: every one is an option, and what cannot be is refused at once.

    python examples/train_options.py --tp 2    # looks at the words, and trains nothing

A run remembers its settings in its folder, so that it can be resumed on any layout.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from spmd_moe.check import Layout

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
RUNS = Path("runs")
JOB = os.environ.get("TORCHELASTIC_RUN_ID", "")  # of torchrun; one job may start the ranks again
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
PATIENCE = 10.0


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
    hang: float = option(30.0, "time limit of a step: seconds beyond the longest step so far", 0.1)
    out: str = option("", "folder of the run; default: the next free number in runs/")
    resume: bool = option(False, "continue the run in --out; default: the newest in runs/")

    def layout(self) -> Layout:
        """The degrees, with a number in place of each 0."""
        tp = self.tp or (2 if WORLD % 2 == 0 else 1)
        ep = self.ep or math.gcd(max(1, WORLD // self.etp), self.experts)
        return Layout(dp=max(1, WORLD // tp), tp=tp, ep=ep, etp=self.etp)


# What a run is; the rest may change when it is resumed.
FREE = ("steps", "tp", "ep", "etp", "fsdp", "check", "every", "save", "hang", "out", "resume")


def refuse(text: object) -> NoReturn:
    """One line, by one rank, and the exit status of a wrong command line.

    The other ranks wait to be ended: torchrun ends rank 0 when one of them is quicker.
    """
    if RANK == 0:
        print(f"train.py: {str(text).splitlines()[0]}", file=sys.stderr, flush=True)
    else:
        time.sleep(PATIENCE)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


def options(words: list[str], description: str | None = __doc__) -> Options:
    """From the command line; when resumed, what it leaves out is as it was."""
    parser = Parser(
        prog="train.py",
        description=description,
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
    begun = begun_before(chosen)
    if chosen.resume or begun:
        chosen = resumed(begun or newest(chosen), given)
    return check(chosen)


def check(o: Options) -> Options:
    """Refuse what cannot be, before anything is written or another rank is waited for."""
    for f in fields(Options):
        value, low, high = getattr(o, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:
            limits = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            refuse(f"--{f.name.replace('_', '-')} is {value}; it must be {limits}")
    at = o.layout()
    ranks = f"does not divide the number of ranks, {WORLD}"
    for wrong, text in (
        (o.width % o.heads, f"--width {o.width} is not a multiple of --heads {o.heads}"),
        (o.top_k > o.experts, f"--top-k is {o.top_k}, but there are --experts {o.experts}"),
        (WORLD % at.tp, f"--tp {at.tp} {ranks}"),
        (WORLD % (at.ep * at.etp), f"--ep {at.ep} x --etp {at.etp} {ranks}"),
        (o.experts % at.ep, f"--experts {o.experts} is not a multiple of --ep {at.ep}"),
        (o.hidden % at.etp, f"--hidden {o.hidden} is not a multiple of --etp {at.etp}"),
        (o.batch < at.dp, f"--batch is {o.batch}, fewer than the {at.dp} ranks of dp"),
        (o.fsdp and "RANK" not in os.environ, "--fsdp needs ranks: start this under torchrun"),
    ):
        if wrong:
            refuse(text + "; what is left out is as the run had it" * o.resume)
    return o


def begun_before(chosen: Options) -> Path | None:
    """The run that this job has begun, where torchrun has started the ranks again."""
    folders = [Path(chosen.out)] if chosen.out else sorted(RUNS.glob("[0-9][0-9][0-9]"))
    own = [f for f in folders if (f / "job").exists() and (f / "job").read_text() == JOB]
    return own[-1] if ATTEMPT and own else None


def newest(chosen: Options) -> Path:
    numbered = sorted(p for p in RUNS.glob("[0-9][0-9][0-9]") if (p / "options.json").exists())
    return Path(chosen.out) if chosen.out else (numbered[-1] if numbered else RUNS)


def resumed(folder: Path, given: dict[str, Any]) -> Options:
    """The settings of the run, except those that are given now."""
    try:
        was = Options(**json.loads((folder / "options.json").read_text()))
    except (OSError, ValueError, TypeError):
        refuse(f"--resume, but there is no run in {str(folder)!r}")
    for name, value in given.items():
        if name not in FREE and value != getattr(was, name):
            refuse(f"--{name.replace('_', '-')} is {value}, but the run has {getattr(was, name)}")
    return replace(was, **given | {"out": str(folder), "resume": True})


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
        lock(folder)
        new = folder / "options.json.part"  # replaced at once: another rank may be reading it
        new.write_text(json.dumps(asdict(replace(o, resume=False)), indent=2))
        new.replace(folder / "options.json")
        (folder / "job").write_text(JOB)
    except OSError as error:
        refuse(f"{str(folder)!r} cannot be written: {error.strerror}")
    return folder


LOCKS: list[TextIO] = []  # open files, which hold their locks until this process ends


def lock(folder: Path) -> None:
    """Keep a second job out of the run while this one trains in it."""
    LOCKS.append((folder / "lock").open("w"))
    try:
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"another job is training in {str(folder)!r}")
    except OSError:
        pass  # a file system without locks


def main() -> None:
    print(json.dumps(asdict(options(sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
