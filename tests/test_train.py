"""The training example as a user runs it: on other layouts, stopped and resumed, and mistyped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train_ranks import SMALL, metrics, saved

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "examples" / "train.py"
SLOW = pytest.mark.slow
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def start(folder: Path, *words: str, ranks: int = 4) -> subprocess.Popen[str]:
    quiet = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        quiet.pop(name, None)
    return subprocess.Popen(
        [sys.executable, *((*LAUNCHER, str(ranks)) if ranks > 1 else ()), str(TRAIN), *words],
        cwd=folder,
        env=quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(job: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """What it printed, once it has ended as it should."""
    try:
        out, err = job.communicate(timeout=180)
    finally:
        job.kill()
    assert job.returncode == status, err[-3000:]
    return out, err


def run(folder: Path, *words: str, ranks: int = 4) -> str:
    return finished(start(folder, *words, ranks=ranks))[0]


@SLOW
def test_four_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Also under FSDP; and what is printed, written and drawn on the way."""
    said = run(tmp_path, *SMALL, "--steps", "3")
    alone = run(tmp_path, *SMALL, "--steps", "3", "--no-check", "--out", "alone", ranks=1)
    run(tmp_path, *SMALL, "--steps", "3", "--no-check", "--out", "fsdp", "--fsdp")
    assert "types: small_model: no mistake in 1 layouts" in said and "types:" not in alone
    assert "dp 2 x cp 1 x tp 2 = edp 1 x ep 4 x etp 1" in said
    assert len(re.findall(r"^step +[123]  loss \d\.\d{4} +\d+ tokens/s  busiest", said, re.M)) == 3
    picture = Path("runs", "001", "picture.txt")
    assert f"wrote {picture}" in said or "wrote runs/001/picture.png" in said
    want = metrics(tmp_path / "alone")
    assert [step["step"] for step in want] == [1, 2, 3]
    assert want[0]["loss"] - want[2]["loss"] > 1e-3, "nothing was learned: nothing to compare"
    for other in ("runs/001", "fsdp"):
        for mine, theirs in zip(metrics(tmp_path / other), want, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
            assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-3)
            assert sum(map(sum, mine["counts"])) == 2 * 2 * 6 * 24  # layers, choices, batch, length


def children(job: subprocess.Popen[str]) -> list[int]:
    """What torchrun has started, in the order of the ranks."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    return sorted(pid for pid, parent in pairs if parent == job.pid)


def wait_for(job: subprocess.Popen[str], start_of_line: str) -> None:
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith(start_of_line):
            return
    raise AssertionError(finished(job)[1])


@SLOW
@pytest.mark.parametrize(("ranks", "elsewhere"), [(1, ""), (4, "--tp 1 --ep 2 --fsdp")])
def test_an_interrupt_ends_it_after_a_step(ranks: int, elsewhere: str, tmp_path: Path) -> None:
    """Sent to the program, or to one of the ranks that torchrun started."""
    job = start(tmp_path, *SMALL, "--steps", "100000", "--no-check", ranks=ranks)
    wait_for(job, "step     2")
    os.kill(children(job)[2] if ranks > 1 else job.pid, signal.SIGINT)
    out, err = finished(job)
    stopped = re.search(r"stopped after step (\d+); go on: --resume --out runs/001", out)
    assert stopped, out + err[-3000:]
    done = int(stopped[1])
    assert "wrote runs/001/metrics.jsonl" in out and len(saved(tmp_path / "runs/001", done)) > 1
    words = ("--resume", "--steps", str(done + 1), *elsewhere.split())
    said = run(tmp_path, *words, ranks=2 if elsewhere else ranks)
    assert f"resumed after step {done}" in said
    assert [step["step"] for step in metrics(tmp_path / "runs/001")] == [*range(1, done + 2)]


WRONG = {
    "--steps 0": "--steps is 0; it must be at least 1",
    "--rate 2": "--rate is 2.0; it must be at least 0 and at most 1",
    "--rate nan": "--rate is nan; it must be at least 0 and at most 1",
    "--steps some": "argument --steps: invalid int value: 'some'",
    "--stepz 3": "unrecognized arguments: --stepz 3",
    "--width 30": "--width 30 is not a multiple of --heads 4",
    "--top-k 9": "--top-k is 9, but there are --experts 8",
    "--tp 2": "--tp 2 does not divide the number of 1 rank",
    "--ep 2": "--ep 2 x --etp 1 does not divide that of 1 rank",
    "--fsdp": "--fsdp needs ranks: start this under torchrun",
    "--length 100000000": "--length is 100000000, but there are",
    "--resume": "--resume, but there is no run in 'runs'",
    "--out full": "'full' is not empty: --resume goes on with the run in it",
    "--out full/file": "'full/file' cannot be written: File exists",
    "--resume --out full --width 64": "--width is 64, but the run has 32",
}


@SLOW
def test_what_cannot_be_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "full" / "options.json").write_text('{"width": 32}')
    before = sorted(tmp_path.rglob("*"))
    several = list(WRONG.items())
    for some in (several[:5], several[5:10], several[10:]):  # not all at once on a small machine
        jobs = [(start(tmp_path, *words.split(), ranks=1), text) for words, text in some]
        for job, text in jobs:
            out, err = finished(job, status=2)
            assert out == "" and err.startswith(f"train.py: {text}") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
