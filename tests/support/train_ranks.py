"""The training example on the workers of the tests, which start at once, in place of torchrun."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
import train
import train_options

from tests.support.workers import run

SIZES = {"layers": 2, "width": 32, "hidden": 32, "length": 24, "batch": 6, "megabytes": 0.2}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
SMALL += ["--every", "1"]


@dataclass(frozen=True)
class Interrupt:
    """Ctrl-C that reaches one rank only, in the middle of a step."""

    rank: int
    step: int


def train_on(ranks: int, folder: Path, words: str, interrupt: Interrupt | None = None) -> str:
    """Run the example in `folder`; what rank 0 printed. The other ranks print nothing."""
    said = run(ranks, trained, str(folder), words, interrupt)
    assert not any(said[1:])
    return said[0]


def trained(folder: str, words: str, interrupt: Interrupt | None) -> str:
    said = io.StringIO()
    with as_torchrun_does(folder, interrupt), contextlib.redirect_stdout(said):
        train.main(words.split())
    return said.getvalue()


@contextlib.contextmanager
def as_torchrun_does(folder: str, interrupt: Interrupt | None = None) -> Iterator[None]:
    """The environment of a rank; the process group is there already, and stays."""
    rank, world, one_step = dist.get_rank(), dist.get_world_size(), train.one_step
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupted(*inputs: Any) -> Any:
        if interrupt == Interrupt(rank, inputs[3] + 1):
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(*inputs)

    with ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world)))
        stack.enter_context(patch.multiple(train_options, RANK=rank, WORLD=world, PATIENCE=0))
        stack.enter_context(patch.multiple(train, RANK=rank, one_step=interrupted))
        stack.enter_context(patch.object(train, "start_group"))
        stack.enter_context(patch.object(dist, "destroy_process_group"))
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every step, without how fast it was."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def saved(folder: Path, step: int) -> dict[str, bytes]:
    files = (folder / "checkpoints" / f"{step:06}").iterdir()
    return {file.name: file.read_bytes() for file in files}
