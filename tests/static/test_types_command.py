"""`spmd-moe types`: output and exit status, with small stubs in place of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mypy.version
import pytest

from spmd_moe.static.run_types import main
from tests.support import small_mypy_world

ROOT = Path(__file__).resolve().parents[2]
RIGHT = """
from torch import Tensor
from spmd_moe import TP, P, Placed, R, V

def double(x: Placed[Tensor, TP[V]], plain: Tensor) -> Placed[Tensor, TP[V]]:
    y = plain * 2
    return x * 2

def bare(x):
    return x
"""
WRONG = (
    RIGHT
    + """
def whole(x: Placed[Tensor, TP[P]]) -> Placed[Tensor, TP[P]]:
    number: int = "none"
    return x.exp()
"""
)


def types(folder: Path, *words: str) -> tuple[int, str]:
    """The command as a program, with the settings of the small world."""
    small_mypy_world.build(folder, plugin=False)
    command = [sys.executable, "-m", "spmd_moe.static.run_types", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_it_says_what_it_could_follow_of_each_module_and_again_from_the_cache(
    tmp_path: Path,
) -> None:
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "bare.py").write_text("def f(x: int) -> int:\n    return x\n")
    for _ in range(2):
        status, said = types(tmp_path, "right.py", "bare.py")
        assert status == 0, said
        rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if " of " in line}
        assert rows["right"] == ["1", "of", "2", "1", "of", "2", "1"]
        assert rows["bare"] == ["0", "of", "1", "0", "of", "0", "0"]
        assert rows["all"] == ["1", "of", "3", "1", "of", "2", "1"]
        assert "so not checked by mypy: 1 function\n" in said
        assert said.endswith("no placement errors\n")


def test_errors_of_placements_are_printed_and_others_are_counted(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    status, said = types(tmp_path, "wrong.py")
    assert status == 1, said
    assert "exp: x is P on TP  [placement-operation]" in said and "note:   fix:" in said
    # One is about an annotation, one about an assignment.
    assert "incompatible type" not in said and "which `mypy` prints: 2" in said
    assert said.endswith("1 placement error\n")


def test_strict_takes_what_is_unknown_for_an_error(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT)
    status, said = types(tmp_path, "--strict", "right.py")
    assert status == 1 and "argument plain: it is declared without a placement" in said, said


def test_a_run_that_placed_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text("def f(x: int) -> int:\n    return x\n")
    status, said = types(tmp_path, "bare.py")
    assert status == 2 and "nothing was checked: no function here names a placement" in said, said


def test_settings_that_are_none_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "pyproject.toml").write_text('[tool.spmd_moe]\nstrict = ["right"]\n')
    status, said = types(tmp_path, "right.py")
    assert status == 2 and "pyproject.toml: error: its list of strict modules has no effect" in said


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = str(tmp_path)
    assert main([str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("spmd-moe types: there is no file or directory '") and "--help" in said
    monkeypatch.setattr(mypy.version, "__version__", "1.9.0")
    monkeypatch.delitem(sys.modules, "spmd_moe.mypy_plugin", raising=False)
    assert main([here]) == 2
    assert "mypy 2.4 or newer is needed, this is 1.9.0: pip install" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "mypy.version", None)
    assert main([here]) == 2
    said = capsys.readouterr().err
    assert "mypy is not installed: pip install 'spmd-moe[mypy]'" in said and said.count("\n") == 1
