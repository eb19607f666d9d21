"""The page of families says what the records say."""

import re

from spmd_moe.hf.families import FAMILIES
from tests.hf.families_table import BELOW, HEAD, PAGE, row, unsupported


def test_the_page_is_of_these_records() -> None:
    text = PAGE.read_text()
    assert text.startswith(HEAD) and text.endswith(BELOW + unsupported())
    rows = text.removeprefix(HEAD).partition(BELOW)[0].splitlines(keepends=True)
    plain = [re.sub(r"\| \d+e[-+]\d+ \| \d+e[-+]\d+ \|", "| * | * |", line) for line in rows]
    assert plain == [row(family, "*", "*") for family in FAMILIES.values()]
