"""The whole catalogue, and what each level of checks says to each of its bugs."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable

from spmd_moe.check import Layout, run_checks
from spmd_moe.check.compare_one_process import check_values
from spmd_moe.check.findings import Finding
from spmd_moe.check.reports import Report
from spmd_moe.check.signatures import signatures
from spmd_moe.check.subcommands import layout
from spmd_moe.check.target import Target
from tests.catalogue import proof, static, targets
from tests.catalogue.bug import TARGETS, Bug, Fact
from tests.catalogue.bugs_gradients import GRADIENTS, SUMS
from tests.catalogue.bugs_layout import LAYOUTS
from tests.catalogue.bugs_state import STATE
from tests.catalogue.code import changed
from tests.catalogue.facts import FACTS

BUGS = sorted([*GRADIENTS, *SUMS, *LAYOUTS, *STATE], key=lambda bug: bug.id)
EVERYTHING: list[Bug | Fact] = [*BUGS, *FACTS]


@functools.cache
def traced(bug: Bug) -> Report:
    """What the traced check says of it."""
    with changed(bug.id, bug.edits, TARGETS) as code:
        return run_checks(getattr(code, bug.target), chosen=[degrees(bug)], tokens=bug.tokens)


def caught(bug: Bug) -> Finding | None:
    """The finding that is expected of the traced check, at the line where the mistake is."""
    found = (mistake.finding for mistake in traced(bug).mistakes())
    return next((f for f in found if f.rule == bug.rule and stands_at(f, bug)), None)


@functools.cache
def valued(bug: Bug) -> Finding | None:
    """What the check with values finds first."""
    with changed(bug.id, bug.edits, TARGETS) as code:
        return _first_of_values(getattr(code, bug.target), bug)


@functools.cache
def right_values(target: str, bug: Bug) -> Finding | None:
    return _first_of_values(getattr(targets, target), bug)


def _first_of_values(target: Target, bug: Bug) -> Finding | None:
    packages = {"spmd_moe", "tests"}
    with signatures(packages):
        return next(check_values(target, degrees(bug), bug.run, packages, seconds=60.0), None)


def stands_at(finding: Finding, bug: Bug) -> bool:
    file, _, line = finding.at.rpartition(":")
    if not file:  # the name of a parameter
        return finding.at == bug.at
    text = linecache.getline(file, int(line)).strip()
    new = [part.strip() for edit in bug.edits for part in edit.new.splitlines()]
    return bug.at in text if bug.at else any(text in n or n in text for n in new if n)


def degrees(bug: Bug) -> Layout:
    return layout(bug.layout)


@functools.cache
def _right(target: str, degrees: Layout, tokens: int) -> dict[str, object] | str:
    return proof.outcome(getattr(targets, target), degrees, tokens)  # type: ignore[return-value]  # tensors


def goes_wrong(bug: Bug) -> str:
    """What a run with values does that the run of the correct code does not; '' for nothing."""
    right = _right(bug.target, degrees(bug), bug.run)
    assert not isinstance(right, str), f"the correct code fails: {right}"
    with changed(bug.id, bug.edits, TARGETS) as code:
        got = proof.outcome(getattr(code, bug.target), degrees(bug), bug.run)
    return proof.differs(got, right)  # type: ignore[arg-type]  # as above


# --- the table ----------------------------------------------------------------------------------

Verdict = Callable[[Bug | Fact], str]


def _static(bug: Bug | Fact) -> str:
    return static.verdict(bug, tuple(BUGS))


def _traced(bug: Bug | Fact) -> str:
    finding = caught(bug) if isinstance(bug, Bug) else None
    return "" if finding is None else finding.rule


def _values(bug: Bug | Fact) -> str:
    """Of what the traced check does not see: the rest need not be run."""
    finding = valued(bug) if isinstance(bug, Bug) and bug.values else None
    return "" if finding is None else finding.rule


# One column for each level, in the order of the ladder. A level that is added is a line here.
LEVELS: dict[str, Verdict] = {"static": _static, "traced": _traced, "values": _values}


def table() -> str:
    head = ["id", "bug", "in", *LEVELS, "what it says, or what will"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rows = [(bug.id, _row(bug)) for bug in BUGS]
    for fact in FACTS:
        rows.append((fact.id, [fact.id, fact.title, "arithmetic", *_cells(fact), fact.open]))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for _, row in sorted(rows))])


def _row(bug: Bug) -> list[str]:
    finding = caught(bug) or (valued(bug) if bug.values else None)
    said = bug.open if finding is None else first_line(finding)
    modules = dict.fromkeys(edit.module for edit in bug.edits)
    where = ", ".join(f"`{module}`" for module in modules)
    return [bug.id, bug.title, where, *_cells(bug), said]


def _cells(bug: Bug | Fact) -> list[str]:
    """What each level says; of the static one, why it says nothing."""
    said = {name: level(bug) for name, level in LEVELS.items()}
    return [*({**said, "static": said["static"] or f"({static.UNSEEN[bug.id]})"}).values()]


def first_line(finding: Finding) -> str:
    return finding.text.splitlines()[0].replace("|", "/")
