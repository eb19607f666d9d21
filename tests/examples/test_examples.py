"""Every example as a user runs it: alone, and under torchrun."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.docs_blocks import GUEST_CACHE, pages

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
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.stem not in BELOW:
        assert program(str(path), *QUICK.get(path.stem, ()), cwd=tmp_path)
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


@pytest.mark.slow
def test_one_layer_on_one_process_and_on_four() -> None:
    path = ROOT / "examples" / "02_layer.py"
    alone, four = program(str(path)), torchrun(path)
    agreed = re.findall(
        r"rank (\d): outputs and gradients equal", four
    )  # lines of ranks may run together
    assert sorted(agreed) == ["0", "1", "2", "3"]
    shown = "loss 79.97287" + alone.partition("loss 79.97287")[2].partition("rank 0")[0]
    assert shown.count("\n") == 11 and shown in four


@pytest.mark.slow
def test_porting_finds_three_bugs_and_leaves_the_files(tmp_path: Path) -> None:
    path = ROOT / "examples" / "03_porting.py"
    words = ("--cache-dir", str(GUEST_CACHE), "--keep", "here")
    shown = program(str(path), *words, cwd=tmp_path)
    assert [len(re.findall(rf"mypy reports {n} ", shown)) for n in (0, 3)] == [2, 1]
    assert shown.count("[placement-operation]") == shown.count("otherwise:") == 3
    for name in ("before", "typed", "fixed"):
        program(f"here/{name}.py", cwd=tmp_path)  # each is a module that can be imported


def test_porting_says_what_it_needs(tmp_path: Path) -> None:
    hidden = "import runpy, sys; sys.modules['mypy'] = None; "
    hidden += "runpy.run_path(sys.argv.pop(), None, '__main__')"
    words = [sys.executable, "-c", hidden, str(ROOT / "examples" / "03_porting.py")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    needed = "this example needs mypy: pip install 'spmd-moe[dev]', or: pip install mypy\n"
    assert (done.returncode, done.stderr) == (1, needed)
