"""Run items, each in a separate process with a time limit: a failure is a row of the table.

The process is separate because a CUDA error makes the device unusable for the process. It is forked
from this one, which has imported torch and has not started CUDA.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import final

from tests.support.docs_blocks import ROOT

GRACE = 15.0  # for torchrun, which gives its ranks some seconds


class NotHereError(Exception):
    """This machine lacks what an item needs; the message says what."""


@final
@dataclass(frozen=True)
class Item:
    """A check: its name, its function (called with "cuda" or "cpu"), and its time limit."""

    name: str
    run: Callable[[str], str]
    seconds: float


@final
@dataclass(frozen=True)
class Row:
    name: str
    state: str  # seen, not seen, not on this machine
    text: str
    seconds: float


def run_items(items: Sequence[Item], device: str) -> list[Row]:
    """Run all items. On a CPU, which other programs may share, limits are ten times as long."""
    rows = []
    for item in items:
        limit = item.seconds if device == "cuda" else 10 * item.seconds
        rows.append(run_item(replace(item, seconds=limit), device))
        print(f"{rows[-1].name}: {rows[-1].state}: {rows[-1].text}", flush=True)
    return rows


def run_item(item: Item, device: str) -> Row:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(item, device, there))
    begun = time.perf_counter()
    process.start()
    there.close()
    state, text = "not seen", f"no answer within {item.seconds:.0f} s"
    try:
        if here.poll(item.seconds):
            state, text = here.recv()
    except EOFError:
        process.join()
        text = f"the process ended with exit code {process.exitcode}"
    process.join(2)
    if process.is_alive():
        _end(process)
    process.join()
    return Row(item.name, state, _one_line(text), time.perf_counter() - begun)


def _answer(item: Item, device: str, connection: Connection) -> None:
    os.setsid()  # what it starts, such as torchrun, can be ended with it
    try:
        connection.send(("seen", item.run(device)))
    except NotHereError as error:
        connection.send(("not on this machine", str(error)))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        connection.send(("not seen", f"{type(error).__name__} at {where}: {error}"))


def _end(leader: ForkProcess) -> None:
    """End an item and all that it started.

    The ranks of torchrun are in separate sessions, which only torchrun ends, so it gets SIGTERM.
    """
    group = leader.pid
    assert group is not None
    with suppress(ProcessLookupError):  # once all of the group have ended
        os.killpg(group, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            leader.join(0)  # an ended child is in its group until its parent has joined it
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def _one_line(text: str) -> str:
    words = " ".join(text.split()).replace("|", "/")
    return words if len(words) <= 300 else f"{words[:297]}..."


def on_ranks(words: Sequence[str], ranks: int, **environment: str) -> str:
    """The output of a program under torchrun, or alone for 0 ranks.

    The error of a failed program has its last error lines.
    """
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node={ranks}".split()
    launcher = launcher if ranks else []
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        said = [
            line for line in done.stdout.splitlines() if "Error" in line and "Failed" not in line
        ]
        raise RuntimeError(f"exit code {done.returncode}; {' / '.join(said[-2:])}")
    return done.stdout


def table(rows: Sequence[Row], machine: str) -> str:
    lines = ["| item | state | what was seen | seconds |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.name} | {row.state} | {row.text} | {row.seconds:.0f} |" for row in rows]
    return "\n".join([*lines, "", machine])
