"""Differences with one cause, merged into one finding over all configurations."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import nn

from spmd_moe.check.layouts import Layout
from spmd_moe.check.parity.built_target import Question
from spmd_moe.check.parity.compare import Difference
from spmd_moe.core.errors import explain
from spmd_moe.core.messages import plural, short_path

LISTED = 6  # names and norms of one finding


@final
@dataclass(slots=True)
class Cause:
    """What is wrong, the tensors that show it, and where it was seen."""

    key: tuple[str, ...]
    differences: list[Difference]
    follow: list[Difference]  # off as well, without an explanation of their own
    first: Question
    at: str = "unknown"
    ranks: int = 1
    seen: list[Question] = field(default_factory=list)

    def text(self, ran: Sequence[Question]) -> str:
        """The five parts, and where it occurs."""
        first = self.differences[0]
        story = first.story
        names = [d.title for d in self.differences]
        where = ", ".join(names[:LISTED]) + (
            f" and {len(names) - LISTED} more" if names[LISTED:] else ""
        )
        why = story.text if story else "no sum, factor, rank or order that was tried makes it right"
        fixes = story.fixes if story else ("look at what the wrong tensors have in common",)
        lines = [explain(where, self._what(first), why=why, fixes=fixes, at=self.at)]
        if self.follow:
            more = _listed([d.title for d in self.follow])
            lines.append(f"  also off, perhaps because of it: {more}")
        lines.append(f"  in:  {self.first}{_and_more(self.seen)}")
        lines.append(f"  {_where_else(self.seen, ran)}")
        return "\n".join(lines)

    def _what(self, first: Difference) -> str:
        on = "all ranks"
        if len(first.ranks) < self.ranks:
            on = f"rank{'s' if len(first.ranks) > 1 else ''} {_ranks(first.ranks)}"
        when = f" in step {first.step + 1}" if first.step else ""
        if first.what:
            return f"{first.what}{when}"
        norms = ", ".join(f"{x:.3f}" for x in first.norms[:LISTED])
        more = ", .." if len(first.norms) > LISTED else ""
        told = f"not that of one process on {on}{when}: norm / true norm {norms}{more}"
        return f"{told}; off by up to {first.off:.2g} of the largest value"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if names[LISTED:] else ""
    return ", ".join(names[:LISTED]) + more


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", .." if ranks[8:] else "")


def _and_more(seen: Sequence[Question]) -> str:
    return f" and {plural(len(seen) - 1, 'more configuration')}" if len(seen) > 1 else ""


def causes(
    found: Sequence[Difference], question: Question, module: nn.Module, ranks: int
) -> list[Cause]:
    """One for each story; what follows from a wrong output, or wrong gradients, is not one."""
    for kinds in (("output",), ("gradient of input", "gradient of"), ("buffer",), ()):
        mine = [d for d in found if d.kind in kinds or not kinds]
        if mine:
            break
    else:
        return []
    rest = [d for d in found if d not in mine] if mine[0].kind == "output" else []
    groups: dict[tuple[str, ...], list[Difference]] = {}
    for d in mine:
        group = "gradient" if d.kind.startswith("gradient") else d.kind
        key = d.story.key if d.story else ("unknown", d.what)
        groups.setdefault((group, *key), []).append(d)
    unknown = [d for d in mine if d.story is None and not d.what]
    if unknown and len(unknown) < len(mine) and any(d.story for d in mine):
        groups = {k: g for k, g in groups.items() if g[0].story or g[0].what}
        rest = [*unknown, *rest]
    every = [Cause(key, group, [], question, ranks=ranks) for key, group in groups.items()]
    every[0].follow = rest
    for cause in every:
        cause.at = line_of(module, cause.differences[0])
        cause.seen = [question]
    return every


def merged(every: Sequence[Cause]) -> list[Cause]:
    """The same cause in several configurations, by the smallest."""
    found: dict[tuple[str, ...], Cause] = {}
    for cause in every:
        known = found.setdefault(cause.key, cause)
        if known is not cause:
            known.seen.extend(cause.seen)
    return list(found.values())


# --- where it occurs ----------------------------------------------------------------------------


def _where_else(seen: Sequence[Question], ran: Sequence[Question]) -> str:
    others = [q for q in ran if q not in seen]
    if not others:
        return (
            f"in all {plural(len(ran), 'configuration')} that ran"
            if len(ran) > 1
            else "nothing else ran"
        )
    for said, where in _conditions(ran):
        if where == set(seen):
            return f"exactly where {said}; not in {others[0]}{_and_more(others)}"
    return f"not in: {others[0]}{_and_more(others)}"


def _conditions(ran: Sequence[Question]) -> Iterator[tuple[str, set[Question]]]:
    """What could set some configurations apart: an axis, an option, a number of tokens."""
    where: dict[str, set[Question]] = {}
    for question in ran:
        for fact in sorted(_facts(question)):
            where.setdefault(fact, set()).add(question)
    yield from where.items()
    for (a, here), (b, there) in itertools.combinations(where.items(), 2):
        yield f"{a} and {b}", here & there
        yield f"{a} or {b}", here | there


def _facts(question: Question) -> set[str]:
    facts = {f"{name} > 1" for name, size in sizes(question).items() if size > 1}
    facts |= {f"{name} is {value}" for name, value in question.options}
    if question.tokens is not None:
        verb = "is" if question.tokens == 1 else "are"
        facts.add(f"there {verb} {plural(question.tokens, 'token')}")
    return facts


def sizes(question: Question) -> dict[str, int]:
    layout = question.layout
    if isinstance(layout, Layout):
        return {role.name: size for role, size in layout.sizes.items()}
    return dict(layout.sizes)


# --- the user's line ----------------------------------------------------------------------------


def line_of(module: nn.Module, difference: Difference) -> str:
    """Where the tensor is made, in the class that owns it; of an output, the `forward`."""
    if difference.kind not in ("gradient of", "buffer", "parameter after the step"):
        return _function_line(module)
    path = difference.name.split(".")
    for length in range(len(path) - 1, -1, -1):
        try:
            owner = module.get_submodule(".".join(path[:length]))
        except AttributeError:
            continue
        if type(owner).__module__.startswith("torch."):
            continue
        found = _assignment(type(owner), path[length])
        if found:
            return found
    return _function_line(module)


def _function_line(module: nn.Module) -> str:
    for part in module.modules():
        if not type(part).__module__.startswith("torch."):
            code = type(part).forward.__code__ if hasattr(type(part).forward, "__code__") else None
            if code is not None:
                return f"{short_path(code.co_filename)}:{code.co_firstlineno}"
    return "unknown"


def _assignment(kind: type, name: str) -> str:
    """The line of the class that sets the attribute."""
    for owner in kind.__mro__:
        if owner.__module__.startswith("torch.") or owner is object:
            continue
        try:
            lines, start = inspect.getsourcelines(owner)
            file = inspect.getsourcefile(owner) or ""
        except (OSError, TypeError):
            continue
        pattern = re.compile(rf"self\.{re.escape(name)}\b\s*(:[^=]+)?=|[\"']{re.escape(name)}[\"']")
        for number, text in enumerate(lines):
            if pattern.search(text):
                return f"{short_path(file)}:{start + number}"
    return ""
