"""Writes the table of the catalogue, which a test compares with what the checks say.

python -m tests.catalogue.table --write
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.catalogue.catalogue import EVERYTHING, LEVELS, table

PAGE = Path(__file__).parent / "README.md"

TEXT = """\
# The bugs of the field, and what catches them

Each row puts a bug that was reported of a public code base back into correct code by replacing a
few words: in the layer where it has that part, else in a small module (`parts.py`, `styles.py`).
`test_catalogue.py` shows for each that it is one, by a run of all ranks with values that
differs from that of the correct code, and that the check says what stands here, at the line of the
mistake. A letter behind a number is one of several mechanisms of one family. `arithmetic` is a
wrong number outside of any layer. B44, the number of experts as the size of a group, is refused by
the mesh. This page is written by `python -m tests.catalogue.table --write`.

`static` holds the codes (`placement-...`) of what mypy with the plugin says of the changed source,
in strict mode, and not of the right one; that it cannot follow (`unknown`) does not count. After
`typed:` it is what it says of the same mistake in typed code, a function of that number in
`typecheck/fail/bugs.py`: where the source is of a style that types do not follow, or no layer's. In
brackets stands why it says nothing.

{counts}

{table}
"""


def page() -> str:
    return TEXT.format(counts=counts(), table=table())


def counts() -> str:
    families = {bug.family for bug in EVERYTHING}
    lines = [f"{len(EVERYTHING)} bugs of {len(families)} families."]
    for name, says in LEVELS.items():
        caught = [bug for bug in EVERYTHING if says(bug)]
        of = len({bug.family for bug in caught})
        lines.append(f"The {name} check catches {len(caught)}, in {of} families.")
    waiting = [bug.open.partition(":")[0] for bug in EVERYTHING if bug.open]
    lines.append(f"{waiting.count('none')} are seen by no level, with the reason.")
    lines.append(
        f"{waiting.count('plan')} are wrong numbers of code around a layer: `spmd-moe plan` prints "
        "the right ones, and nothing compares them."
    )
    return " ".join(lines)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    PAGE.write_text(page())
