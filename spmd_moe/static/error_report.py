"""Errors, on their lines, unless a comment there allows them:

    y = stranger(x)   # spmd: allow unknown - typed by the other package

On that line; or alone above a statement or a function, for all of it. The word is a code without
`placement-`; several stand with commas between them, those of the traced check among them. A
comment needs a reason; in strict mode also something to allow.
"""

from __future__ import annotations

import re
import tokenize
from dataclasses import dataclass, field
from typing import Any

from mypy.errorcodes import ErrorCode
from mypy.nodes import Context, FuncDef, Statement

from spmd_moe.static.error_codes import CODES, TRACED
from spmd_moe.static.messages import Problem
from spmd_moe.static.syntax_tree import below

_ALLOW = re.compile(r"#\s*spmd:\s*allow\s+(\w+(?:\s*,\s*\w+)*)(?:\s+-\s*([^#]*[^#\s]))?\s*(?:#|$)")


@dataclass
class _Allowed:
    what: tuple[str, ...]
    reason: str | None
    alone: bool  # on a line of its own, above what it allows
    used: bool = False


@dataclass(frozen=True)
class Line:
    """One line of what mypy is to print."""

    text: str
    where: Context
    code: ErrorCode | None
    is_note: bool = False

    def tell(self, checker: Any) -> None:
        (checker.note if self.is_note else checker.fail)(self.text, self.where, code=self.code)


@dataclass
class Report:
    checker: Any
    module: str
    lines: list[Line] = field(default_factory=list)
    allowed: dict[int, _Allowed] = field(default_factory=dict)
    covered: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.allowed = _comments(self.checker.path)
        for node in below(self.checker.tree) if self.allowed else ():
            if isinstance(node, FuncDef | Statement) and self._is_alone(node.line - 1):
                self.covered.append((node.line - 1, node.line, node.end_line or node.line))

    def _is_alone(self, line: int) -> bool:
        return line in self.allowed and self.allowed[line].alone

    def problem(self, problem: Problem | None, where: Context) -> None:
        if problem is None or self._allows(problem.code, where):
            return
        code = CODES[problem.code]
        self.lines.append(Line(problem.what, where, code))
        self.lines += [Line(line, where, code, is_note=True) for line in problem.lines()]

    def note(self, text: str, where: Context) -> None:
        self.lines.append(Line(text, where, None, is_note=True))

    def finish(self, *, strict: bool) -> None:
        """Complain of comments that allow nothing; what strict mode alone reports only there."""
        for line, comment in self.allowed.items():
            where = Context(line, 0)
            words = ", ".join(comment.what)
            if not set(comment.what) <= CODES.keys() | TRACED:
                self._complain(where, f"allow {words}: there is no such code")
            elif comment.reason is None:
                self._complain(where, f"allow {words}: it gives no reason")
            elif not comment.used and strict and not set(comment.what) & (TRACED - CODES.keys()):
                self._complain(where, f"allow {words}: there is nothing to allow here")

    def _complain(self, where: Context, what: str) -> None:
        fix = "# spmd: allow <code> - <reason>"
        self.lines.append(Line(f"{what} (write {fix})", where, CODES["allow"]))

    def _allows(self, code: str, where: Context) -> bool:
        lines = [*range(where.line - 1, (where.end_line or where.line) + 1)]
        above = [at for at, begin, end in self.covered if begin <= where.line <= end]
        for line in [*lines, *above]:
            comment = self.allowed.get(line)
            if comment is None or code not in comment.what or comment.reason is None:
                continue
            if line >= where.line or comment.alone:
                comment.used = True
                return True
        return False


def _comments(path: str) -> dict[int, _Allowed]:
    """The comments of a file that allow something, by line."""
    found: dict[int, _Allowed] = {}
    try:
        with tokenize.open(path) as source:
            text = source.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return found
    if "spmd:" not in text:
        return found
    for number, line in enumerate(text.splitlines(), 1):
        match = _ALLOW.search(line)
        if match is not None:
            found[number] = _Allowed(
                tuple(re.split(r"\s*,\s*", match[1])), match[2], line.lstrip().startswith("#")
            )
    return found
