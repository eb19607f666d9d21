"""The README is true: its programs print what it shows, its tables and files are the code's."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.bench.train_layouts import LAYOUTS
from tests.support.docs_blocks import (
    README,
    ROOT,
    SAID,
    Block,
    blocks,
    file_tree,
    generated,
    outcome,
    rewritten,
)

TEXT = README.read_text()


@pytest.mark.parametrize("block", list(blocks(TEXT)), ids=lambda b: f"block {b.number}")
def test_programs_do_what_is_shown(block: Block) -> None:
    got = outcome(block)  # an error that is not ours ends the test
    assert block.shown is None or got == block.shown, block.code


def test_generated_parts_are_fresh() -> None:
    assert generated(TEXT) == TEXT, "python -m tests.support.docs_blocks --write"


@pytest.mark.slow
def test_what_mypy_says_is_fresh() -> None:
    assert generated(TEXT, SAID) == TEXT, "python -m tests.support.docs_blocks --write"
    stale = TEXT.replace("x_TD is V and self.gate_ED is I on TP", "x_TD is V")
    assert stale != TEXT and generated(stale, SAID) == TEXT


def test_every_file_says_what_it_is() -> None:
    assert all(len(line.split()) > 2 for line in file_tree().splitlines() if line.startswith("  "))


def test_it_opens_with_a_program_that_fails_and_its_fix() -> None:
    head = TEXT.splitlines()[:25]
    assert head.index("```python") < 10 and any(line.startswith("The fix is") for line in head)
    (fix,) = re.findall(r"The fix is one argument: `(.*)`", TEXT)
    first = next(blocks(TEXT))
    failing = first.code.splitlines()[-1].partition("#")[0].strip()
    program = first.code.replace(failing, fix.replace("(x, ", "(torch.ones(5, 8), "))
    cured = "from spmd_moe import ShardShape\n" + program
    assert outcome(Block(0, cured, None)) == "" != outcome(first)


def test_optional_features_are_those_that_something_uses() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {
        name: [re.split(r"[<>=]", line)[0] for line in lines]
        for name, lines in extras["optional-dependencies"].items()
    }
    assert set(re.findall(r"\.\[(\w+)\]", TEXT)) == set(packages)
    code = "".join(
        p.read_text() for d in ("spmd_moe", "examples") for p in (ROOT / d).rglob("*.py")
    )
    used = re.findall(r"""find_spec\("(\w+)"\)""", code)
    assert {name for own in packages if own != "dev" for name in packages[own]} <= set(used)


def test_losses_are_those_that_are_claimed() -> None:
    """By `tests/bench/train_layouts.py`: at least six agree in float32, and all in float64."""
    (table,) = re.findall(r"<!-- losses:.*?-->\n(.*?)\n\n", TEXT, re.S)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == len(LAYOUTS) >= 6
    losses = [float(row[-3]) for row in rows]
    assert sum(abs(loss - losses[0]) <= 1e-4 for loss in losses) >= 6
    assert all(float(row[-1]) < 1e-10 for row in rows)


def test_a_stale_readme_is_found() -> None:
    stale = TEXT.replace("all_reduce (P to I)", "all_reduce (P to R)")
    assert stale != TEXT and generated(stale) == TEXT
    wrong = TEXT.replace("5 rows as [2, 2, 1, 0] - 2", "5 rows as [2, 2, 1, 0] - 3")
    assert wrong != TEXT and rewritten(wrong) == TEXT
