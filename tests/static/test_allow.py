"""Comments that allow an error in the static check, and what is reported of malformed ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.static.test_plugin import run
from tests.support import small_mypy_world

# A line with `# E` has the error of its operation, one with `# A` an error about its comment.
SOURCE = '''
from torch import Tensor
from spmd_moe import TP, P, Placed, R
A = Placed[Tensor, TP[P]]
B = Placed[Tensor, TP[R]]

def plain(p: A, r: B) -> None:
    _ = p + r  # E

def deliberate(p: A, r: B) -> None:
    _ = p + r  # spmd: allow operation - a test
    # spmd: allow operation - a test
    _ = (
        r + r,
        p + r,
    )
    _ = (
        p + r,
        r + r,
    )  # spmd: allow operation - a test
    _ = p + r  # type: ignore[misc]  # spmd: allow operation - a test

# spmd: allow operation - a test
@staticmethod
def decorated(p: A, r: B) -> None:
    _ = p + r

@staticmethod
# spmd: allow operation - a test
def below_the_decorator(p: A, r: B) -> None:
    _ = p + r

def commented_out(p: A, r: B) -> None:
    # _ = p + p.exp()  # spmd: allow operation - an old line
    _ = p + r  # E

def in_a_string(p: A, r: B) -> None:
    print("# spmd: allow operation - a string"); _ = p + r  # E

def in_a_docstring(p: A, r: B) -> None:
    """Text.

    # spmd: allow operation - text"""
    _ = p + r  # E

TEXT = """
# spmd: allow operation - the last line of a string"""
def below_a_string(p: A, r: B) -> None:
    _ = p + r  # E

def malformed(p: A, r: B) -> None:
    _ = p + r  # spmd: allow operation  # E A
    _ = p + r  # spmd: allow opperation - a typo  # E A
    _ = p + r  # spmd: allow operation, move - two codes  # E A
    _ = p + r  # spmd: allow this operation - prose  # E A
    _ = p + r  # spmd: allow - no code  # E A
    _ = p + r  # spmd: allow move - another code  # E
'''
REPORTED = re.compile(r"^c\.py:(\d+): error: (.*?)  \[placement-(\w+)\]$", re.M)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_what_comments_allow_and_what_is_reported_of_them(tmp_path: Path, strict: bool) -> None:
    settings = small_mypy_world.build(tmp_path)
    if not strict:
        settings.write_text(settings.read_text().replace("strict = c, e", "strict = e"))
    (tmp_path / "c.py").write_text(SOURCE)
    said = run(tmp_path, "--config-file", str(settings), "c.py")
    found = {(int(line), code) for line, _, code in REPORTED.findall(said)}
    lines = dict(enumerate(SOURCE.splitlines(), 1))
    want = {(n, "operation") for n, line in lines.items() if re.search("# E", line)}
    want |= {(n, "allow") for n, line in lines.items() if line.endswith("A")}
    unused = {(n, "allow") for n, line in lines.items() if "another code" in line and strict}
    assert found == want | unused, said
    told = [text for _, text, code in REPORTED.findall(said) if code == "allow"]
    fix = "(write # spmd: allow <code> - <reason>)"
    assert told == [
        f"allow operation: it gives no reason {fix}",
        f"allow opperation: there is no such code {fix}",
        f"allow operation, move: a comment allows one code {fix}",
        f"allow this operation: a comment allows one code {fix}",
        f"allow: it names no code {fix}",
        *[f"allow move: there is nothing to allow here {fix}"] * strict,
    ]
