"""Findings of the checks, and the comments that allow a line to break a rule."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import final

from spmd_moe.check.rules import RULES, WORDS
from spmd_moe.core.messages import explain
from spmd_moe.core.messages import short_path as short_path
from spmd_moe.signatures.allow_comments import find_allowing, read_allow_comments


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong; `text` has the five parts of an error."""

    rule: str
    at: str  # file:line of the checked code
    text: str

    def __post_init__(self) -> None:
        assert RULES[self.rule].reports, f"{self.rule} has no row that findings may name"

    def __str__(self) -> str:
        return f"[{self.rule}] {self.text}"

    @property
    def kind(self) -> tuple[str, str]:
        """What makes two findings the same mistake, seen twice."""
        return self.rule, self.at


def finding(rule: str, at: str, where: str, what: str, why: str, *fixes: str) -> Finding:
    """The finding of a rule, with the five parts of an error."""
    return Finding(rule, at, explain(where, what, why=why, fixes=fixes, at=at))


def allowed(what: str, file: str, line: int) -> bool:
    """True where a comment says so: `# spmd: allow detach - counts have no gradient`."""
    assert what in WORDS, f"no rule has the word {what!r}"
    comments = read_allow_comments("".join(linecache.getlines(file)))
    return find_allowing(comments, what, line) is not None
