"""The rows of the rules: complete, used by the code, and printed from one place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spmd_moe
from spmd_moe.check.findings import allowed, finding
from spmd_moe.check.rules import LEVELS, RULES, WORDS, rules_table, rules_text
from spmd_moe.static.error_codes import CODES, STATIC_RULES, TRACED, codes_table

CHECK = Path(spmd_moe.__file__).parent / "check"
SOURCES = "\n".join(
    path.read_text() for path in sorted(CHECK.glob("*.py")) if path.name != "rules.py"
)


def test_every_number_has_a_row() -> None:
    numbers = [int(rule.id[1:]) for rule in RULES.values() if re.fullmatch(r"X\d+", rule.id)]
    assert numbers == list(range(1, 13))


def test_every_rule_is_used_and_every_use_has_a_row() -> None:
    used = set(re.findall(r'"(X\d+|types|crash|untyped)"', SOURCES))
    assert used == {rule.id for rule in RULES.values() if rule.reports}


def test_every_word_is_used() -> None:
    asked = set(re.findall(r'allowed\("(\w+)"', SOURCES))
    asked |= set(re.findall(r'_say\("\w+", "(\w+)"', SOURCES))
    asked |= set(re.findall(r'^    "(\w+)": "', SOURCES, re.M)) & WORDS  # checker_escapes.ESCAPES
    assert asked == WORDS == TRACED


def test_what_has_no_row_is_a_defect_of_the_checker() -> None:
    with pytest.raises(KeyError, match="X99"):
        finding("X99", "a.py:1", "f", "what", "why")
    with pytest.raises(AssertionError, match="X6 has no row"):
        finding("X6", "a.py:1", "f", "what", "why")
    with pytest.raises(AssertionError, match="no rule has the word 'everything'"):
        allowed("everything", __file__, 1)


def test_rows_are_whole() -> None:
    for rule in (*RULES.values(), *STATIC_RULES.values()):
        assert rule.name and rule.demands and set(rule.levels) <= set(LEVELS), rule
        assert not rule.demands.endswith(".") and rule.severity in ("error", "warning")


def test_tables_print_every_row() -> None:
    assert rules_table().count("\n") == len(RULES) + 1
    assert (
        codes_table().count("\n") == len(STATIC_RULES) + 1 and CODES.keys() == STATIC_RULES.keys()
    )
    assert "| X6 | coverage |" in rules_table() and "X6" not in rules_text()
    assert all(len(line) <= 100 for line in rules_text().splitlines())


def test_the_rows_need_no_torch() -> None:
    program = "import spmd_moe.static.error_codes, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    program = "import spmd_moe.check.findings, spmd_moe.check as c; c.Case; import sys; "
    program += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 1
