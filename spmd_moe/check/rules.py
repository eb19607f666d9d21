"""Rules of the checks, one row each: what a rule demands, where it runs, what allows an exception.

A new rule is one row here, one function that yields its findings, and one test file. `--help`, the
documentation and the JSON report print these rows. This file imports no torch: the static check,
which has rows of its own, reads the words that the traced check allows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

Level = Literal["traced", "source", "values", "static", "strict", "plan", "sweep"]
Severity = Literal["error", "warning"]

# Where a rule runs, as `--help` and the documentation explain it.
LEVELS: dict[Level, str] = {
    "traced": "`spmd-moe check`: one rank at a time, with typed tensors",
    "source": "`spmd-moe check`: the source of the functions that ran",
    "values": "`spmd-moe check --values`: all ranks, beside one process",
    "static": "mypy with the plugin",
    "strict": "mypy with the plugin, in modules that are listed as strict",
    "plan": "`spmd-moe plan`, and every constructor",
    "sweep": "the choice of layouts, coordinates and numbers of tokens",
}


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `words` are those of `# spmd: allow WORD - reason` on a line that may break it."""

    id: str  # in reports: `X5`, or `placement-move`
    name: str
    demands: str
    levels: tuple[Level, ...]
    words: tuple[str, ...] = ()
    severity: Severity = "error"
    instead: str = ""  # why no finding ever has this number

    @property
    def reports(self) -> bool:
        """Whether findings of this rule exist."""
        return not self.instead


_ESCAPES = ("no_typecheck", "register_no_typecheck", "mutate_type")
_ROWS = (
    Rule(
        "types",
        "types",
        "every operation, signature and declaration agrees with the types of its tensors",
        ("traced",),
    ),
    Rule(
        "crash",
        "crash",
        "the module runs, at every coordinate and number of tokens",
        ("traced", "values"),
    ),
    Rule(
        "untyped",
        "untyped",
        "every tensor in the module has a type on every axis",
        ("traced",),
        ("untyped",),
    ),
    Rule(
        "X1",
        "declared sums",
        "a sum over ranks takes what was declared to be a part of a sum (P), never V",
        ("traced",),
        ("sum",),
    ),
    Rule(
        "X2",
        "rank-dependent numbers",
        "what is the same on all ranks of an axis is computed alike on them: "
        "no slice, mask or factor by a plain rank, no random numbers of one rank",
        ("traced",),
        ("rank", "random"),
    ),
    Rule(
        "X3",
        "typed collectives",
        "tensors move through typed collectives only, and nothing cuts their gradients or types",
        ("traced", "source"),
        ("raw", "detach", "no_grad", *_ESCAPES),
    ),
    Rule(
        "X4",
        "state keeps its type",
        "parameters and buffers keep their declared types",
        ("traced",),
    ),
    Rule(
        "X5",
        "same collectives",
        "all coordinates issue the same collectives in the same order, with fitting shapes",
        ("traced", "values"),
    ),
    Rule(
        "X6",
        "coverage",
        "every layout is tried at the coordinates and numbers of tokens where code can differ",
        ("sweep",),
        instead="a property of the sweep, not of a module: each run of `spmd-moe check` has it",
    ),
    Rule(
        "X7",
        "sharded dims",
        "a dim that is cut over ranks is not mixed with others, nothing that needs all of it runs "
        "along it, and one axis cuts one dim of a product",
        ("traced",),
        ("shard",),
    ),
    Rule(
        "X8",
        "obligations",
        "each parameter's reductions, gradient divisor and storage follow from its type",
        ("plan",),
        instead="a table, not a finding: `spmd-moe plan` and `obligations(model, mesh)` print it",
    ),
    Rule(
        "X9",
        "complete declarations",
        "every declaration names a tensor, and every parameter and buffer is named by one, for "
        "all axes",
        ("traced",),
    ),
    Rule(
        "X10",
        "complete backward",
        "backward reaches every trainable parameter, with the same collectives "
        "however few rows there are",
        ("traced",),
    ),
    Rule(
        "X11",
        "true types",
        "types are true of the values, and all ranks together compute what one process does",
        ("values",),
    ),
    Rule(
        "X12",
        "types without sizes",
        "types do not depend on the number of tokens",
        ("traced",),
        ("size",),
    ),
)
RULES: dict[str, Rule] = {rule.id: rule for rule in _ROWS}
# Every word that a comment may allow the traced check.
WORDS: frozenset[str] = frozenset(word for rule in _ROWS for word in rule.words)


def rules_table(rules: Iterable[Rule] = RULES.values()) -> str:
    """Rules in Markdown, as the documentation shows them."""
    lines = ["| rule | name | demands | runs in | `# spmd: allow` | |", "| --- " * 6 + "|"]
    for rule in rules:
        words = ", ".join(f"`{word}`" for word in rule.words)
        last = rule.severity if rule.reports else f"no findings: {rule.instead}"
        where = ", ".join(rule.levels)
        lines.append(f"| {rule.id} | {rule.name} | {rule.demands} | {where} | {words} | {last} |")
    return "\n".join(lines)


def rules_text(rules: Iterable[Rule] = RULES.values()) -> str:
    """Rules as `--help` lists them."""
    lines = list[str]()
    for rule in (rule for rule in rules if rule.reports):
        words = f" [allow: {', '.join(rule.words)}]" if rule.words else ""
        lines += textwrap.wrap(
            f"  {rule.id:<8} {rule.demands}{words}", 96, subsequent_indent=" " * 11
        )
    return "\n".join(lines)
