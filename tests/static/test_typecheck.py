"""typecheck/ through mypy, with our plugin and without: what passes, and what must fail."""

from __future__ import annotations

import os
import re
import runpy
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from mypy import api

from spmd_moe.static.error_codes import CODES
from spmd_moe.static.problems_found import RAISE
from tests.support.mypy_lock import mypy_alone

ROOT = Path(__file__).resolve().parents[2]
PASS = sorted((ROOT / "typecheck" / "pass").glob("*.py"))
FAIL = sorted((ROOT / "typecheck" / "fail").glob("*.py"))
REVEAL = sorted((ROOT / "typecheck" / "reveal").glob("*.py"))
REPORTED = re.compile(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", re.M)
SHOWN = re.compile(r'^(.+?):(\d+): note: Revealed placement is "(.*)"$', re.M)
MARKED = re.compile(r"# E: ([\w-]+(?:, [\w-]+)*)$")
REVEALED = re.compile(r"# N: (.*)$")

Report = tuple[str, int, str]


def mypy(*words: str | Path) -> str:
    """What mypy says. An error of the plugin's own is an error here, not a tensor unknown."""
    with mypy_alone(), mock.patch.dict(os.environ, {RAISE: "1"}):
        out, trouble, _ = api.run(["--no-pretty", "--no-error-summary", *map(str, words)])
    assert not trouble and "INTERNAL ERROR" not in out, trouble + out
    return out


@cache
def with_plugin() -> str:
    return mypy("--config-file", ROOT / "pyproject.toml", *PASS, *FAIL, *REVEAL)


def errors(said: str) -> set[Report]:
    """File, line and code of each error."""
    return {(Path(f).name, int(line), code) for f, line, code in REPORTED.findall(said)}


def marked(path: Path, mark: re.Pattern[str] = MARKED) -> set[Report]:
    lines = enumerate(path.read_text().splitlines(), 1)
    found = ((number, mark.search(line)) for number, line in lines)
    return {
        (path.name, number, code) for n, match in found if match for number, code in _each(n, match)
    }


def _each(number: int, match: re.Match[str]) -> list[tuple[int, str]]:
    many = match[1].split(", ") if match.re is MARKED else [match[1]]
    return [(number, one) for one in many]


MARKS = sorted(set().union(*map(marked, FAIL)))
REVEALS = sorted(set().union(*(marked(path, REVEALED) for path in REVEAL)))


@pytest.mark.slow
@pytest.mark.parametrize("mark", MARKS, ids=lambda m: f"{m[0]}:{m[1]}:{m[2]}")
def test_each_marked_line_fails(mark: Report) -> None:
    assert mark in errors(with_plugin())


@pytest.mark.slow
def test_nothing_else_fails() -> None:
    assert errors(with_plugin()) - set(MARKS) == set()


@pytest.mark.slow
@pytest.mark.parametrize("mark", REVEALS, ids=lambda m: f"{m[0]}:{m[1]}")
def test_each_placement_is_found(mark: Report) -> None:
    shown = {(Path(f).name, int(line), text) for f, line, text in SHOWN.findall(with_plugin())}
    assert mark in shown


def test_there_are_marks_and_every_code_has_some() -> None:
    assert len(MARKS) > 185 and len(REVEALS) > 40
    codes = {code for _, _, code in MARKS}
    assert {f"placement-{name}" for name in CODES} - codes == set()


def without_plugin(cache: str) -> str:
    """Our settings without our plugin, and a cache of their own."""
    text = (ROOT / "pyproject.toml").read_text()
    without = re.sub(r"^plugins = .*$", f'cache_dir = ".mypy_cache/{cache}"', text, flags=re.M)
    assert without != text
    return without


PLAIN = [path for path in FAIL if path.stem == "without_plugin"]
NO_TORCH = '[[tool.mypy.overrides]]\nmodule = ["torch.*"]\nfollow_imports = "skip"\n'
STRICT_BUT_FOR_TORCH = "strict = true\ndisallow_subclassing_any = false"


def test_without_the_plugin_there_is_no_false_alarm(tmp_path: Path) -> None:
    """Typed code is plain Python to a checker that does not know of placements, nor of torch."""
    config = tmp_path / "pyproject.toml"
    settings = without_plugin("no_torch") + NO_TORCH
    config.write_text(settings.replace("strict = true", STRICT_BUT_FOR_TORCH))
    found = errors(mypy("--config-file", config, *PASS, *PLAIN))
    want = set().union(*map(marked, PLAIN))
    assert found < want and len(want - found) == 2, "what torch's own types tell"


@pytest.mark.long  # mypy reads torch a second time
def test_without_the_plugin_what_is_wrong_of_torch_is_found_too(tmp_path: Path) -> None:
    config = tmp_path / "pyproject.toml"
    config.write_text(without_plugin("without_plugin"))
    assert errors(mypy("--config-file", config, *PASS, *PLAIN)) == set().union(*map(marked, PLAIN))


@pytest.mark.parametrize("path", PASS, ids=lambda p: p.stem)
def test_what_passes_also_runs(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")
