"""The training example, with a rank that is killed, stops, or has a full disk.

    FAULT='stop backward 2 6 marker' torchrun --nproc-per-node 4 -m tests.support.train_faults ...

FAULT is what happens, in which part of a step, on which rank, in which step, and a file that then
gets the time. `run_with` starts such a job and says how it ended.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.docs_blocks import ROOT

WHERE = ("forward", "backward", "reduction", "save")
RANK, STEP = 2, 4  # where it happens
SIZES = "--layers 2 --width 32 --hidden 32 --length 24 --batch 8 --megabytes 0.2 --no-check"
TOLD = re.compile(r"^(?:watch_hangs, rank (\d)|train\.py: (?:rank (\d) ends|save_checkpoint: ))")
LIMIT = 240.0  # seconds of a whole job


@dataclass(frozen=True)
class Ended:
    """How a job with a fault ended. Seconds are counted from the fault."""

    status: int
    seconds: float
    told: list[tuple[float, str]]  # first lines of messages, and when they came
    output: str
    left: list[int]  # processes of the job that still run


def run_with(fault: str, where: str, words: str = "--hang 5") -> Ended:
    with tempfile.TemporaryDirectory() as name:
        folder, lines = Path(name), list[tuple[float, str]]()
        marker = folder / "marker"
        job = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "4", "-m", "tests.support.train_faults"),
                *f"{SIZES} --steps 8 --save {STEP} {words} --out {folder / 'run'}".split(),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
                "OMP_NUM_THREADS": "1",
                "FAULT": f"{fault} {where} {RANK} {STEP} {marker}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

        def read() -> None:
            assert job.stdout is not None
            lines.extend((time.time(), line) for line in job.stdout)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            status = job.wait(LIMIT)
            ended = time.time()
            left = _of_session(job.pid)
        finally:
            for pid in _of_session(job.pid):
                os.kill(pid, signal.SIGKILL)
            reader.join()
            if job.stdout is not None:
                job.stdout.close()
        begin = float(marker.read_text())
    told = [(at - begin, line.rstrip()) for at, line in lines if TOLD.match(line)]
    return Ended(status, ended - begin, told, "".join(line for _, line in lines), left)


def _of_session(leader: int) -> list[int]:
    """Processes that this job started, those included that torchrun no longer knows."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,sid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    return [pid for pid, session in pairs if session == leader]


# --- in the job -------------------------------------------------------------------------------


def fill_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


ACTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "full": fill_disk,
}


def main() -> None:
    import train

    from spmd_moe.train.checkpoint import on_disk

    act, wanted, rank, step, marker = os.environ["FAULT"].split()
    steps = 0

    def at(where: str) -> None:
        if where == wanted and str(train.RANK) == rank and str(steps) == step:
            Path(marker).write_text(str(time.time()))
            ACTS[act]()

    def before(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            at(where)
            return function(*args, **named)

        return wrapped

    def one_step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return original(*args)

    def forward(module: Any, inputs: Any) -> None:
        at("forward")
        inputs[0].register_hook(lambda grad: at("backward"))

    def build(*args: Any, **named: Any) -> Any:
        model = made(*args, **named)
        model.blocks[1].register_forward_pre_hook(forward)  # the first has sent its tokens
        return model

    original, made = train.one_step, train.build
    train.one_step = one_step  # type: ignore[assignment]  # it takes anything
    train.build = build
    train.reduce_gradients = before("reduction", train.reduce_gradients)
    on_disk.Writer.write_data = before("save", on_disk.Writer.write_data)  # type: ignore[method-assign]  # a fault
    train.main(sys.argv[1:])


if __name__ == "__main__":
    main()
