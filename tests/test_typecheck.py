"""typecheck/ through mypy without a plugin: correct code passes, and each marked line fails."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).resolve().parent.parent
PASS = sorted((ROOT / "typecheck" / "pass").glob("*.py"))
FAIL = sorted((ROOT / "typecheck" / "fail").glob("*.py"))
REPORTED = re.compile(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", re.M)
MARKED = re.compile(r"# E: ([\w-]+)$")


def errors(*paths: Path) -> set[tuple[str, int, str]]:
    """File, line and code of each error of mypy, strict as pyproject.toml has it."""
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--no-pretty"]
    out, trouble, _ = api.run([*options, *map(str, paths)])
    assert not trouble, trouble
    return {(Path(f).name, int(line), code) for f, line, code in REPORTED.findall(out)}


def marked(path: Path) -> set[tuple[str, int, str]]:
    lines = enumerate(path.read_text().splitlines(), 1)
    found = ((number, MARKED.search(line)) for number, line in lines)
    return {(path.name, number, match[1]) for number, match in found if match}


@pytest.mark.slow
def test_mypy_sees_what_is_marked_and_no_more() -> None:
    wanted = set().union(*map(marked, FAIL))
    assert len(wanted) > 5
    assert errors(*PASS, *FAIL) == wanted


@pytest.mark.parametrize("path", PASS, ids=lambda p: p.stem)
def test_what_passes_also_runs(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")
