"""Comments that allow a code: which text is one, and which lines it covers."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest

from spmd_moe.signatures.allow_comments import find_allowing, read_allow_comments

# A line that ends in `#<` has the problem; the comments must allow it (True), or must not (False).
CASES: dict[str, tuple[bool, str]] = {
    "on the line": (True, "y = x.detach()  # spmd: allow detach - why"),
    "above": (True, "# spmd: allow detach - why\ny = x.detach()  #<"),
    "no spaces": (True, "y = x.detach()  #spmd:allow detach - a reason"),
    "behind another tool": (True, "y = x  # type: ignore[misc]  # spmd: allow detach - why"),
    "before another tool": (True, "y = x  # spmd: allow detach - why  # noqa: E501"),
    "two above": (
        True,
        "# spmd: allow raw - a\n# spmd: allow detach - b\n# and more\ny = x  #<",
    ),
    "two on a line": (True, "y = x  # spmd: allow raw - one  # spmd: allow detach - two"),
    "above, with a dash in the reason": (True, "# spmd: allow detach - a - b\ny = x  #<"),
    "in a string": (False, 's = "# spmd: allow detach - a string"; y = x  #<'),
    "in an f-string": (False, 's = f"# spmd: allow detach - {x}"; y = x  #<'),
    "in a docstring": (
        False,
        'def f(x):\n    """\n\n    # spmd: allow detach - text"""\n    y = x  #<',
    ),
    "in a string that ends above": (False, 's = """\n# spmd: allow detach - text"""\ny = x  #<'),
    "commented-out code": (False, "# y = x.detach()  # spmd: allow detach - old\ny = x  #<"),
    "behind prose": (False, "y = x  # as above  # spmd: allow detach - text  #<"),
    "in the middle of a comment": (False, "y = x  # see spmd: allow detach - text"),
    "prose": (False, "y = x  # spmd: allow this odd detach and more - words"),
    "two codes": (False, "y = x  # spmd: allow detach, raw - a reason"),
    "two words": (False, "y = x  # spmd: allow raw detach - a reason"),
    "no reason": (False, "y = x  # spmd: allow detach"),
    "a reason without words": (False, "y = x  # spmd: allow detach - ..."),
    "no code": (False, "y = x  # spmd: allow - a reason"),
    "another code": (False, "y = x  # spmd: allow raw - a reason"),
    "another word": (False, "y = x  # spmd: allows detach - a reason"),
    "an empty line between": (False, "# spmd: allow detach - why\n\ny = x  #<"),
    "on the line before": (False, "z = x  # spmd: allow detach - why\ny = x  #<"),
    "on the line after": (False, "y = x  #<\nz = x  # spmd: allow detach - why"),
    "the next statement": (False, "# spmd: allow detach - why\nz = x\ny = x  #<"),
    "last line of a statement": (
        True,
        "y = f(\n    x.detach(),  #<\n    z,\n)  # spmd: allow detach - why",
    ),
    "first line of a statement": (
        True,
        "y = f(  # spmd: allow detach - why\n    x.detach(),  #<\n)",
    ),
    "above a statement of several lines": (
        True,
        "# spmd: allow detach - why\ny = f(\n    z,\n    x.detach(),  #<\n)",
    ),
    "between its lines": (
        True,
        "y = f(\n    z,\n    # spmd: allow detach - why\n    x.detach(),  #<\n)",
    ),
    "with a backslash": (
        True,
        "# spmd: allow detach - why\ny = x + \\\n    x.detach()  #<",
    ),
    "above a function": (
        True,
        "# spmd: allow detach - why\ndef f(x):\n    z = x\n    y = x  #<",
    ),
    "above its decorators": (
        True,
        "# spmd: allow detach - why\n@a\n@b(\n    1\n)\ndef f(x):\n    y = x  #<",
    ),
    "between its decorators": (
        True,
        "@a\n# spmd: allow detach - why\n@b\ndef f(x):\n    y = x  #<",
    ),
    "between decorators and def": (
        True,
        "@a  #<\n# spmd: allow detach - why\ndef f(x):\n    y = x",
    ),
    "above a method": (
        True,
        "class A:\n    # spmd: allow detach - why\n    def f(self):\n        y = x  #<",
    ),
    "above a class": (
        True,
        "# spmd: allow detach - why\nclass A:\n    def f(self):\n        x  #<",
    ),
    "above a block": (True, "# spmd: allow detach - why\nwith a:\n    y = x  #<"),
    "in the header of a block": (False, "with a:  # spmd: allow detach - why\n    y = x  #<"),
    "in the header of a function": (
        False,
        "def f(x):  # spmd: allow detach - why\n    y = x  #<",
    ),
    "on a parameter": (
        True,
        "def f(\n    a,\n    x: A[\n  B  #<\n  ],  # spmd: allow detach - why\n):\n    pass",
    ),
    "on another parameter": (
        False,
        "def f(\n    a: A,  #<\n    x: B,  # spmd: allow detach - why\n) -> C:\n    pass",
    ),
    "at the end of a header": (
        True,
        "def f(  #<\n    x: B,\n) -> C:  # spmd: allow detach - why\n    pass",
    ),
    "on an item of with": (
        True,
        "with f(\n    x.detach()  #<\n) as a, g(  # spmd: allow detach - why\n    1\n):\n    pass",
    ),
    "the function after": (
        False,
        "# spmd: allow detach - why\ndef f(x):\n    pass\ndef g(x):\n    y = x  #<",
    ),
    "one line": (True, "if a: y = x  # spmd: allow detach - why"),
    "source that Python cannot parse": (False, "y = (x  # spmd: allow detach - why"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_comment_allows(name: str) -> None:
    want, source = CASES[name]
    lines = source.splitlines()
    line = next((n for n, text in enumerate(lines, 1) if text.endswith("#<")), 1)
    found = find_allowing(read_allow_comments(source), "detach", line)
    assert (found is not None) is want


def test_the_nearest_comment_is_the_one_that_allows() -> None:
    source = dedent("""\
        # spmd: allow detach - for all of it
        def f(x):
            # spmd: allow detach - for these two lines
            y = g(
                x,  # spmd: allow detach - the same two lines
            )
            z = x
        """)
    comments = read_allow_comments(source)
    assert [(c.line, c.covers) for c in comments] == [(1, (2, 7)), (3, (4, 6)), (5, (4, 6))]
    nearest = [find_allowing(comments, "detach", line) for line in (2, 4, 7)]
    assert [comment and comment.line for comment in nearest] == [1, 3, 1]


def test_the_reader_needs_no_torch() -> None:
    program = "import spmd_moe.signatures.allow_comments, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
