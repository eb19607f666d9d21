"""Wrong command lines of the training example: one line by one rank, and nothing is written."""

from __future__ import annotations

import contextlib
import fcntl
import io
import math
import os
from dataclasses import Field, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import train
import train_options

from tests.support.train_ranks import as_torchrun_does
from tests.support.workers import run

NUMBERS = [f for f in fields(train_options.Options) if type(f.default) in (int, float)]
LIMITS = [(f, end) for f in NUMBERS for end in ("low", "high") if math.isfinite(f.metadata[end])]
WRONG = {
    "--rate nan": "--rate is nan; it must be at least 0 and at most 1",
    "--clip nan": "--clip is nan; it must be at least 1e-06",
    "--rate": "argument --rate: expected one argument",
    "--fsdp=yes": "argument --fsdp/--no-fsdp: ignored explicit argument 'yes'",
    "--stepz 3": "unrecognized arguments: --stepz 3",
    "3": "unrecognized arguments: 3",
    "--width 30": "--width 30 is not a multiple of --heads 4",
    "--top-k 9": "--top-k is 9, but there are --experts 8",
    "--tp 2": "--tp 2 does not divide the number of ranks, 1",
    "--ep 2": "--ep 2 x --etp 1 does not divide the number of ranks, 1",
    "--resume --out cut": "--ep 4 x --etp 1 does not divide the number of ranks, 1; what is left",
    "--fsdp": "--fsdp needs ranks: start this under torchrun",
    "--length 100000000": "--length is 100000000, but there are",
    "--length 10000 --megabytes 0.01": "--length is 10000, but there are 10000 bytes of source",
    "--resume": "--resume, but there is no run in 'runs'",
    "--out full": "'full' is not empty: --resume goes on with the run in it",
    "--out full/file": "'full/file' cannot be written: File exists",
    "--resume --out full --width 64": "--width is 64, but the run has 32",
    "--resume --out odd": "--resume, but there is no run in 'odd'",
}

FOLDERS = {"full": '{"width": 32}', "odd": '{"width": ', "cut": '{"ep": 4}'}  # settings of runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, settings in FOLDERS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "options.json").write_text(settings)
    (tmp_path / "full" / "file").write_text("")
    return tmp_path


def refusal(folder: Path, words: str) -> str:
    """The line that a command line is answered with; nothing else is left of it."""
    before, said, out = sorted(folder.rglob("*")), io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(pytest.raises(SystemExit, match=r"^2$"))
        train.main(words.split())
    assert out.getvalue() == "" and sorted(folder.rglob("*")) == before
    line = said.getvalue()
    assert line.startswith("train.py: ") and line.endswith("\n") and line.count("\n") == 1
    return line.removeprefix("train.py: ").rstrip()


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be(words: str, folder: Path) -> None:
    assert refusal(folder, words).startswith(WRONG[words])


@pytest.mark.parametrize(("option", "end"), LIMITS, ids=lambda v: getattr(v, "name", v))
def test_every_limit(option: Field[Any], end: str, folder: Path) -> None:
    limit, kind = option.metadata[end], int if option.type == "int" else float
    step = 1 if kind is int else 0.001
    value = kind(limit - step if end == "low" else limit + step)
    flag = f"--{option.name.replace('_', '-')}"
    assert refusal(folder, f"{flag} {value}").startswith(f"{flag} is {value}; it must be ")


@pytest.mark.parametrize("option", NUMBERS, ids=lambda f: f.name)
def test_what_is_no_number(option: Field[Any], folder: Path) -> None:
    flag, kind = f"--{option.name.replace('_', '-')}", type(option.default).__name__
    assert refusal(folder, f"{flag} some") == f"argument {flag}: invalid {kind} value: 'some'"


def test_every_number_has_a_lower_limit() -> None:
    assert {f.name for f, end in LIMITS if end == "low"} == {f.name for f in NUMBERS}


def test_other_ranks_leave_the_line_to_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.multiple(train_options, RANK=1, PATIENCE=0), pytest.raises(SystemExit, match=r"^2$"):
        train_options.options(["--steps", "0"])
    assert capsys.readouterr() == ("", "")


def with_another(folder: str, option: str) -> str:
    """Rank 1 is given an option that the other is not."""
    said = io.StringIO()
    with as_torchrun_does(folder), contextlib.redirect_stderr(said):
        words = option.split() if os.environ["RANK"] == "1" else []
        with pytest.raises(SystemExit, match=r"^2$"):
            train.main(["--no-check", "--megabytes", "0.1", *words])
    return said.getvalue()


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("--rate 0.5", "rate=0.003"),
        ("--width 32", "width=64"),
        ("--megabytes 0.2", "megabytes=0.1"),
        ("--tp 1", "tp=2"),
    ],
)
def test_ranks_that_are_told_otherwise(option: str, shown: str, tmp_path: Path) -> None:
    """Before the first step: there are no metrics yet, and no checkpoint."""
    line, silence = run(2, with_another, str(tmp_path), option)
    assert silence == "" and line.count("\n") == 1
    assert line.startswith("train.py: ") and "called with different settings" in line
    assert shown in line and "on ranks [0]" in line and "on ranks [1]" in line
    assert {p.name for p in (tmp_path / "runs/001").iterdir()} == {"options.json", "job", "lock"}


def test_two_jobs_in_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    again = train_options.Options(out=str(folder / "run"), resume=True)
    with (folder / "run" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            train_options.claimed(again)
        assert "another job is training in " in capsys.readouterr().err
    train_options.claimed(again)
    while train_options.LOCKS:
        train_options.LOCKS.pop().close()
