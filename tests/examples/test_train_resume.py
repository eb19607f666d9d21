"""The training example stopped by a signal on one layout, and resumed on it and on others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.train_ranks import SMALL, Interrupt, metrics, saved, train_on

QUICK = " ".join([*SMALL, "--no-check"])
FROM = (4, "--tp 2 --ep 4")
LAYOUTS = [
    (2, "--tp 1 --ep 2 --fsdp"),
    pytest.param(4, "--tp 4 --ep 2 --etp 2 --fsdp", marks=pytest.mark.slow),
    # That a checkpoint is read on any layout: tests/train/test_checkpoint.py.
    pytest.param(4, "--tp 1 --ep 2 --fsdp", marks=pytest.mark.long),
    pytest.param(2, "--tp 2 --ep 1", marks=pytest.mark.long),
    pytest.param(1, "--tp 1 --ep 1 --fsdp", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in a folder: one that was never stopped, and one that Ctrl-C ended after step 3."""
    folder, (ranks, layout) = tmp_path_factory.mktemp("runs"), FROM
    train_on(ranks, folder, f"{QUICK} {layout} --steps 6 --out whole")
    said = train_on(
        ranks, folder, f"{QUICK} {layout} --steps 6 --out parts", Interrupt(rank=2, step=3)
    )
    assert "stopped after step 3; go on: --resume --out parts" in said
    assert len(metrics(folder / "parts")) == 3
    return folder


def resumed(stopped: Path, folder: Path, ranks: int, words: str) -> Path:
    shutil.copytree(stopped / "parts", folder / "parts")
    with (folder / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step"')  # as a crash would leave it
    said = train_on(ranks, folder, f"--resume --out parts --steps 6 --no-check {words}")
    assert "resumed after step 3" in said
    return folder / "parts"


@pytest.mark.gloo
def test_on_the_same_layout_to_the_bit(stopped: Path, tmp_path: Path) -> None:
    parts = resumed(stopped, tmp_path, *FROM)
    assert metrics(parts) == metrics(stopped / "whole") and len(metrics(parts)) == 6
    assert saved(parts, 6) == saved(stopped / "whole", 6)


@pytest.mark.gloo
def test_a_run_that_has_ended(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "whole", tmp_path / "whole")
    said = train_on(FROM[0], tmp_path, "--resume --out whole --no-check")
    assert "nothing is left to do: the run has 6 steps, and --steps is 6" in said


@pytest.mark.gloo
@pytest.mark.parametrize(("ranks", "words"), LAYOUTS)
def test_on_another_layout(stopped: Path, ranks: int, words: str, tmp_path: Path) -> None:
    parts, whole = metrics(resumed(stopped, tmp_path, ranks, words)), metrics(stopped / "whole")
    assert parts[:3] == whole[:3] and len(parts) == 6
    for mine, theirs in zip(parts[3:], whole[3:], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-4)
    assert whole[0]["loss"] - whole[5]["loss"] > 0.05, "nothing was learned: nothing to compare"
