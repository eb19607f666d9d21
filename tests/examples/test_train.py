"""The training example as a user runs it: on other layouts, stopped and resumed, and mistyped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.train_ranks import SMALL, metrics, saved, train_on

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "train.py"
SLOW = pytest.mark.slow
ENDED_WITHIN = 40.0  # seconds: torchrun gives ranks 30 to end by themselves
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def start(folder: Path, *words: str, ranks: int = 4, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = (*LAUNCHER, str(ranks), f"--max-restarts={restarts}")
    quiet = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        quiet.pop(name, None)
    return subprocess.Popen(
        [sys.executable, *(launcher if ranks > 1 else ()), str(TRAIN), *words],
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
    """And what is printed, written and drawn on the way. FSDP: test_train_resume.py."""
    said = run(tmp_path, *SMALL, "--steps", "3")
    alone = run(tmp_path, *SMALL, "--steps", "3", "--no-check", "--out", "alone", ranks=1)
    assert "types: small_model: no mistake in 1 layout," in said and "types:" not in alone
    assert "dp 2 x cp 1 x tp 2 = edp 1 x ep 4 x etp 1" in said
    assert len(re.findall(r"^step +[123]  loss \d\.\d{4} +\d+ tokens/s  busiest", said, re.M)) == 3
    picture = Path("runs", "001", "picture.txt")
    assert f"wrote {picture}" in said or "wrote runs/001/picture.png" in said
    want = metrics(tmp_path / "alone")
    assert [step["step"] for step in want] == [1, 2, 3]
    assert want[0]["loss"] - want[2]["loss"] > 1e-3, "nothing was learned: nothing to compare"
    for mine, theirs in zip(metrics(tmp_path / "runs/001"), want, strict=True):
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
@pytest.mark.parametrize(
    ("ranks", "elsewhere"),
    [(1, ""), pytest.param(4, "--tp 1 --ep 2 --fsdp", marks=pytest.mark.long)],
)
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


@pytest.mark.gloo
@pytest.mark.long
def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    """Its job ends on all ranks, says which one it was, and goes on from the last checkpoint."""
    words = (*SMALL, "--no-check", "--save", "2", "--steps", "24")
    job = start(tmp_path, *words, restarts=1)
    wait_for(job, "step     5")
    ranks, begin = children(job), time.monotonic()
    os.kill(ranks[2], signal.SIGKILL)
    while set(ranks) & set(children(job)):
        assert time.monotonic() - begin < ENDED_WITHIN
        time.sleep(0.1)
    out, err = finished(job)
    (after,) = re.findall(r"resumed after step (\d+)", out)
    assert f"exitcode: -9) local_rank: 2 (pid: {ranks[2]})" in err
    ended = re.findall(r"^train\.py: rank (\d) ends because another rank has ended$", err, re.M)
    assert ended and "2" not in ended and "Traceback" not in err
    assert int(after) >= 4 and int(after) % 2 == 0
    train_on(4, tmp_path, " ".join([*words, "--out", "whole"]))
    assert metrics(tmp_path / "runs/001") == metrics(tmp_path / "whole")  # to the bit
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "whole"]
    assert len(metrics(tmp_path / "whole")) == 24 and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.long
def test_a_wrong_command_line_under_torchrun(tmp_path: Path) -> None:
    job = start(tmp_path, "--batch", "1", "--tp", "1")
    out, err = finished(job, status=1)  # torchrun's own
    assert out == "" and re.findall("^train.py: .*", err, re.M) == [
        "train.py: --batch is 1, fewer than the 4 ranks of dp"
    ]
    assert not [line for line in err.splitlines() if "train.py" in line and "File" in line]
    assert not list(tmp_path.iterdir())
