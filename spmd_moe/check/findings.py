"""What a check finds, and the rules by which it finds it."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from pathlib import Path
from typing import final

from spmd_moe.signatures.allow_comments import find_allowing, read_allow_comments

# Every rule by its name: what it demands. The README prints this table.
RULES = {
    "types": "every operation, signature and declaration agrees with the types of its tensors",
    "crash": "the module runs, at every coordinate and number of tokens",
    "untyped": "every tensor in the module has a type on every axis",
    "X1": "a sum over ranks takes what was declared to be a part of a sum (P), never V",
    "X2": "what is the same on all ranks of an axis is computed alike on them: "
    "no slice, mask or factor by a plain rank",
    "X3": "tensors move through typed collectives only, and nothing cuts their gradients or types",
    "X4": "parameters and buffers keep their declared types",
    "X5": "all coordinates issue the same collectives in the same order, with fitting shapes",
    "X7": "a dim that is cut over ranks is not mixed with others, and nothing that needs all of it "
    "runs along it",
    "X9": "every declaration names a tensor, and every parameter and buffer is named by one, for "
    "all axes",
    "X10": "backward reaches every trainable parameter, with the same collectives "
    "however few rows there are",
    "X11": "types are true of the values, and all ranks together compute what one process does",
    "X12": "types do not depend on the number of tokens",
}


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong; `text` has the five parts of an error."""

    rule: str
    at: str  # file:line of the checked code
    text: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.text}"

    @property
    def kind(self) -> tuple[str, str]:
        """What makes two findings the same mistake, seen twice."""
        return self.rule, self.at


def finding(rule: str, at: str, where: str, what: str, why: str, *fixes: str) -> Finding:
    lines = [f"{where}: {what}.", f"  why: {why}."]
    lines += [f"  fix: {fix}" for fix in fixes]
    lines.append(f"  at:  {at}")
    return Finding(rule, at, "\n".join(lines))


def allowed(code: str, file: str, line: int) -> bool:
    """True where a comment says so: `# spmd: allow detach - counts have no gradient`."""
    comments = read_allow_comments("".join(linecache.getlines(file)))
    return find_allowing(comments, code, line) is not None


def short(file: str) -> str:
    """A path as the user would write it."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
