"""Comments that allow in place what a check would report. Needs no torch.

    y = stranger(x)  # spmd: allow unknown - typed by the other package

A comment on a line of a statement covers that statement; in the header of a function or block that
takes several lines, the parameter or expression on its line. A comment alone directly above a
statement, a function or a decorator covers all of it. A comment allows one code and gives a reason;
several comments may stand above each other. Text in strings and commented-out code allow nothing.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from tokenize import COMMENT, DEDENT, ENDMARKER, INDENT, NEWLINE, NL, TokenInfo
from typing import final

# Comments of other tools may precede ours; behind other text, ours is prose or commented-out code.
_OTHER_TOOL = re.compile(r"(type|noqa|pragma|fmt|isort|mypy|nosec|pylint|pyright|ruff)\b")
_ALLOW = re.compile(r"spmd:\s*allow\b(.*)")

Lines = tuple[int, int]  # the first and the last


@final
@dataclass(frozen=True, slots=True)
class AllowComment:
    """One comment, and the lines that it covers."""

    line: int
    words: str  # between `allow` and the dash; one code, unless it is malformed
    reason: str  # empty if there is none
    covers: Lines

    def allows(self, code: str, line: int) -> bool:
        first, last = self.covers
        return self.words == code and bool(self.reason) and first <= line <= last


def find_allowing(comments: Iterable[AllowComment], code: str, line: int) -> AllowComment | None:
    """The comment that allows `code` on a line; the one that covers the fewest lines."""
    found = (comment for comment in comments if comment.allows(code, line))
    return min(found, key=lambda comment: comment.covers[1] - comment.covers[0], default=None)


@lru_cache(maxsize=64)
def read_allow_comments(source: str) -> tuple[AllowComment, ...]:
    """The comments of a source that begin with `# spmd: allow`, malformed ones included."""
    if "spmd:" not in source:
        return ()
    try:
        layout = _Layout(source)
    except (tokenize.TokenError, SyntaxError):
        return ()
    return tuple(
        AllowComment(line, words, reason, layout.covered_by(line))
        for line, text in layout.comments.items()
        for words, reason in _allowed_in(text)
    )


def _allowed_in(comment: str) -> Iterator[tuple[str, str]]:
    """Words and reason of each `spmd: allow` that a comment starts with."""
    for part in map(str.strip, comment.lstrip("#").split("#")):
        match = _ALLOW.match(part)
        if match is not None:
            words, *rest = re.split(r"\s+-\s*", f"{match[1]} ", maxsplit=1)
            reason = "".join(rest).strip()
            yield words.strip(), reason if re.search(r"\w", reason) else ""
        elif not _OTHER_TOOL.match(part):
            return


class _Layout:
    """The lines of a source: its comments, its logical lines, its statements."""

    def __init__(self, source: str) -> None:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        self.comments = {t.start[0]: t.string for t in tokens if t.type == COMMENT}
        self._logical: dict[int, Lines] = {}
        for lines in _logical_lines(tokens):
            self._logical |= dict.fromkeys(range(lines[0], lines[1] + 1), lines)
        spaces = (COMMENT, NL, NEWLINE, INDENT, DEDENT, ENDMARKER)
        code = {n for t in tokens if t.type not in spaces for n in range(t.start[0], t.end[0] + 1)}
        self._alone = self.comments.keys() - code
        self._statements: dict[int, Lines] = {}  # by the lines above which a comment covers them
        self._headers: dict[int, list[Lines]] = {}  # parameters and expressions, by the first line
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.stmt):
                self._add(node)

    def _add(self, node: ast.stmt) -> None:
        decorators: list[ast.expr] = getattr(node, "decorator_list", [])
        starts = [*(decorator.lineno for decorator in decorators), node.lineno]
        for start in starts:
            _, last = self._statements.get(start, (0, 0))
            self._statements[start] = min(starts), max(last, _lines_of(node)[1])
        if hasattr(node, "body"):
            self._headers[node.lineno] = [_lines_of(part) for part in _header_parts(node)]

    def covered_by(self, line: int) -> Lines:
        """The lines that a comment on this line covers."""
        if line not in self._alone:
            return self._around(line)
        while line in self._alone:
            line += 1
        return self._statements.get(line) or self._around(line)

    def _around(self, line: int) -> Lines:
        first, last = self._logical.get(line, (line, line))
        if line == last or first not in self._headers:
            return first, last
        parts = [part for part in self._headers[first] if part[0] <= line <= part[1]]
        return min([line, *(p[0] for p in parts)]), max([line, *(p[1] for p in parts)])


def _logical_lines(tokens: Iterable[TokenInfo]) -> Iterator[Lines]:
    """Physical lines that Python reads as one."""
    first = 0
    for token in tokens:
        if token.type == NEWLINE:
            yield first, token.start[0]
            first = 0
        elif not first and token.type not in (COMMENT, NL, INDENT, DEDENT):
            first = token.start[0]


def _header_parts(node: ast.AST) -> Iterator[ast.expr | ast.arg | ast.keyword]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.arguments | ast.withitem):
            yield from _header_parts(child)
        elif isinstance(child, ast.expr | ast.arg | ast.keyword):
            yield child


def _lines_of(node: ast.stmt | ast.expr | ast.arg | ast.keyword) -> Lines:
    return node.lineno, node.end_lineno or node.lineno
