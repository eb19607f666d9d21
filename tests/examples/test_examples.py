"""Every example as a user runs it: alone, and on the ranks of a job."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests.support.command_server import Commands
from tests.support.docs_blocks import GUEST_CACHE, pages
from tests.support.mypy_lock import mypy_alone
from tests.support.workers import run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


QUICK = {"train": ("--steps", "2", "--no-check")}  # a run of its default length is a minute
BELOW = {"02_layer", "03_porting"}  # run alone by tests of their own


def program(*words: str, cwd: Path = ROOT) -> str:
    """What a program prints; it must end well."""
    quiet = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=quiet, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    server = Commands()
    yield server
    server.close()


def alone(commands: Commands, path: Path, *words: str, cwd: Path = ROOT) -> str:
    """What a program prints on one process; it must end well."""
    done = commands.run(str(path), *words, path=str(cwd))
    assert done.status == 0, done.err[-3000:]
    return done.out


def on_rank(path: str) -> str:
    """What a program prints on this rank of the workers, which stand for those of torchrun."""
    place = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    said = StringIO()
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, place))
        for name in ("init_process_group", "destroy_process_group"):
            stack.enter_context(patch.object(dist, name))
        stack.enter_context(patch.object(sys, "argv", [path]))
        stack.enter_context(redirect_stdout(said))
        runpy.run_path(path, run_name="__main__")
    return said.getvalue()


def torchrun(path: Path, *words: str, ranks: int = 4) -> str:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return program(*launcher, str(path), *words)


def test_every_example_that_the_docs_name_is_there() -> None:
    text = "".join(page.read_text() for page in pages())
    named = set(re.findall(r"examples/(\w+\.py)", text))
    assert named == {path.name for path in EXAMPLES}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs_alone_and_helps(
    path: Path,
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if path.stem not in BELOW:
        assert alone(commands, path, *QUICK.get(path.stem, ()), cwd=tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code and "usage:" in capsys.readouterr().out


@pytest.mark.long  # that it runs, and torchrun with another example, is seen by its neighbours
def test_redistribute_is_drawn_rank_by_rank() -> None:
    drawing = torchrun(ROOT / "examples" / "01_redistribute.py")
    assert "5 rows as [2, 2, 1, 0] on axis 'tp' (4 ranks)" in drawing
    after = [line for line in drawing.splitlines() if line.startswith("  after ")]
    assert after[0].split() == ["after", "a", "b", "c", "d", "e", ".", ".", "."]
    assert after[1].split() == ["after", *"abcde" * 4]


@pytest.mark.gloo
def test_one_layer_on_one_process_and_on_four(commands: Commands) -> None:
    """torchrun itself: test_train.py."""
    path = ROOT / "examples" / "02_layer.py"
    said = alone(commands, path)
    shown = "loss 79.97287" + said.partition("loss 79.97287")[2].partition("rank 0")[0]
    assert shown.count("\n") == 11
    four = run(4, on_rank, str(path))
    for rank, printed in enumerate(four):
        assert f"rank {rank}: outputs and gradients equal" in printed
    assert shown in four[0]


@pytest.mark.slow
def test_porting_finds_three_bugs_and_leaves_the_files(tmp_path: Path, commands: Commands) -> None:
    path = ROOT / "examples" / "03_porting.py"
    words = ("--cache-dir", str(GUEST_CACHE), "--keep", "here")
    with mypy_alone():
        shown = alone(commands, path, *words, cwd=tmp_path)
    assert [len(re.findall(rf"mypy reports {n} ", shown)) for n in (0, 3)] == [2, 1]
    assert shown.count("[placement-operation]") == shown.count("otherwise:") == 3
    for name in ("before", "typed", "fixed"):
        alone(commands, Path(f"here/{name}.py"), cwd=tmp_path)  # each can be imported


def test_porting_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "examples" / "03_porting.py")
    monkeypatch.setitem(sys.modules, "mypy", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", [path])
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_path(path, run_name="__main__")
    needed = "this example needs mypy: pip install 'spmd-moe[mypy]', or: pip install mypy\n"
    assert capsys.readouterr().err == needed
