"""The training example as a user runs it: on other layouts, stopped and resumed, and mistyped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "examples" / "train.py"
SIZES = {"layers": 2, "width": 32, "hidden": 32, "length": 24, "batch": 6, "megabytes": 0.2}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
SMALL += ["--every", "1"]
SLOW = pytest.mark.slow
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")


def start(folder: Path, *words: str, ranks: int = 4) -> subprocess.Popen[str]:
    quiet = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        quiet.pop(name, None)
    return subprocess.Popen(
        [sys.executable, *(LAUNCHER if ranks > 1 else ()), str(TRAIN), *words],
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


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every step, without how fast it was."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def saved(folder: Path, step: int) -> dict[str, bytes]:
    files = (folder / "checkpoints" / f"{step:06}").iterdir()
    return {file.name: file.read_bytes() for file in files}


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


@SLOW
def test_a_resumed_run_is_one_that_never_stopped(tmp_path: Path) -> None:
    quick = (*SMALL, "--no-check", "--save", "2")
    run(tmp_path, *quick, "--steps", "4", "--out", "whole")
    run(tmp_path, *quick, "--steps", "2", "--out", "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.0}\n{"step"')  # as a crash leaves it
    said = run(tmp_path, "--resume", "--out", "parts", "--steps", "4")
    assert "resumed after step 2" in said
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert len(whole) == 4 and parts == whole  # to the bit
    assert saved(tmp_path / "parts", 4) == saved(tmp_path / "whole", 4)


@SLOW
@pytest.mark.parametrize("ranks", [1, 4])
def test_an_interrupt_ends_it_after_a_step(ranks: int, tmp_path: Path) -> None:
    job = start(tmp_path, *SMALL, "--steps", "100000", "--no-check", ranks=ranks)
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("step     2"):
            break
    job.send_signal(signal.SIGINT)
    try:
        out, err = job.communicate(timeout=120)
    finally:
        job.kill()
    stopped = re.search(r"stopped after step (\d+); go on: --resume --out runs/001", out)
    assert stopped, out + err[-3000:]
    done = int(stopped[1])
    assert "wrote runs/001/metrics.jsonl" in out and len(saved(tmp_path / "runs/001", done)) > 1
    said = run(tmp_path, "--resume", "--steps", str(done + 1), ranks=ranks)
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
