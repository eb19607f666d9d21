"""Errors and notes for mypy to print, except what a comment in the source allows.

Comments are read by `signatures/allow_comments.py`. Their code is that of the error without
`placement-`, or one of the traced check's. A comment that is malformed is an error; in strict mode,
so is one that allows nothing.
"""

from __future__ import annotations

import tokenize
from dataclasses import dataclass, field
from typing import Any

from mypy.errorcodes import ErrorCode
from mypy.nodes import Context

from spmd_moe.signatures.allow_comments import AllowComment, find_allowing, read_allow_comments
from spmd_moe.static.error_codes import CODES, TRACED
from spmd_moe.static.messages import Problem


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
    used: set[AllowComment] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.comments = read_allow_comments(_source(self.checker.path))

    def problem(self, problem: Problem | None, where: Context) -> None:
        if problem is None or self._allows(problem.code, where):
            return
        code = CODES[problem.code]
        self.lines.append(Line(problem.what, where, code))
        self.lines += [Line(line, where, code, is_note=True) for line in problem.lines()]

    def note(self, text: str, where: Context) -> None:
        self.lines.append(Line(text, where, None, is_note=True))

    def finish(self, *, strict: bool) -> None:
        """Report comments that are malformed and, in strict mode, those that allow nothing."""
        for comment in self.comments:
            wrong = _malformed(comment)
            if not wrong and strict and comment not in self.used and comment.words in CODES:
                wrong = "there is nothing to allow here"
            if wrong:
                what = f"allow {comment.words}".rstrip()
                text = f"{what}: {wrong} (write # spmd: allow <code> - <reason>)"
                self.lines.append(Line(text, Context(comment.line, 0), CODES["allow"]))

    def _allows(self, code: str, where: Context) -> bool:
        comment = find_allowing(self.comments, code, where.line)
        if comment is not None:
            self.used.add(comment)
        return comment is not None


def _malformed(comment: AllowComment) -> str:
    """What is wrong with a comment; empty if nothing is."""
    if comment.words not in CODES.keys() | TRACED:
        if not comment.words:
            return "it names no code"
        one = comment.words.replace(",", " ").split() == [comment.words]
        return "there is no such code" if one else "a comment allows one code"
    return "" if comment.reason else "it gives no reason"


def _source(path: str) -> str:
    try:
        with tokenize.open(path) as source:
            return source.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
