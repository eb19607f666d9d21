"""Comparison of the runs of one layout: across coordinates and across numbers of tokens.

X2   R and I tensors are computed by the same operations with the same plain arguments
X5   all coordinates issue the same collectives
X10  all numbers of tokens issue the same collectives, in backward too
X12  each program point has the same types for all numbers of tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TypeAlias

from spmd_moe.check.findings import Finding, allowed, finding, short_path
from spmd_moe.check.mirror_world import Issued
from spmd_moe.check.record import Operand, Point, Seen, Types
from spmd_moe.check.trace import Trace
from spmd_moe.core.messages import kinds_text, plural
from spmd_moe.core.placement import DENSE, EXPERT

Found: TypeAlias = Iterator[tuple[Trace, Finding]]


def compare(traces: Sequence[Trace]) -> Found:
    """All traces of one layout, in pairs that differ in one thing; each finding with its trace."""
    built = [t for t in traces if not t.refused]
    if not built:
        return
    most = max(t.configuration.tokens for t in built)
    for rank in sorted({t.configuration.rank for t in built}):
        mine = [t for t in built if t.configuration.rank == rank]
        at_most = [t for t in built if t.configuration.tokens == most]
        many = next((t for t in mine if t.configuration.tokens == most), at_most[0])
        for few in mine:
            if few.configuration.tokens != most:
                yield from _by_tokens(many, few)
    for tokens in sorted({t.configuration.tokens for t in built}):
        mine = [t for t in built if t.configuration.tokens == tokens]
        first = mine[0]
        for other in mine[1:]:
            yield from _by_place(first, other)


def _ran(trace: Trace) -> bool:
    """Runs to its end, also after a finding."""
    return not any(finding.rule in ("types", "crash", "X9") for finding in trace.findings)


def _same_reads(a: Trace, b: Trace) -> int:
    """How many reads of data gave both the same. After the next one, sizes may differ for it."""
    pairs = zip(a.record.reads, b.record.reads, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x[1] != y[1]), len(a.record.reads))


# --- a different number of tokens ---------------------------------------------------------------


def _by_tokens(many: Trace, few: Trace) -> Found:
    found = list(_other_types(many, few))
    same_rank = many.configuration.rank == few.configuration.rank
    if not found and same_rank and _ran(many) and _ran(few):
        found = list(_other_collectives(many, few, "X10", _tokens(many), _tokens(few)))
    yield from found


def _other_types(many: Trace, few: Trace) -> Found:
    """The first program point whose result has another type with fewer tokens: R -> sum -> R."""
    for point, passes in few.record.points.items():
        before = many.record.points.get(point)
        if before is None:
            continue
        known = {_kinds(seen) for seen in before} | {()}
        if known == {()}:
            continue  # refused, or nothing that has a type
        for seen in passes:
            if _kinds(seen) not in known and not allowed("size", *point.lines[-1]):
                yield few, _depends_on_size(point, many, before[0], few, seen)
                return


def _kinds(seen: Seen) -> tuple[Types, ...]:
    """Of its results, once each: how many parts something is cut into may depend on its size."""
    return tuple(dict.fromkeys(types for types in seen.results if types))


def _depends_on_size(point: Point, many: Trace, a: Seen, few: Trace, b: Seen) -> Finding:
    return finding(
        "X12",
        point.at,
        point.op,
        f"it gives {_shown(a.results)} with {_tokens(many)}, and {_shown(b.results)} with "
        f"{_tokens(few)}",
        "a type must not depend on a size: what is whole on every rank for a few tokens is added "
        "up as many times as there are ranks, or not at all",
        "redistribute(x, axis, src=..., dst=S(0), shape=ShardShape.even(tokens, axis.size))"
        "   # for any number of tokens",
    )


def _shown(results: Sequence[Types]) -> str:
    return ", ".join(kinds_text(types) or "no type" for types in results)


def _tokens(trace: Trace) -> str:
    return plural(trace.configuration.tokens, "token")


# --- other coordinates --------------------------------------------------------------------------


def _by_place(first: Trace, other: Trace) -> Found:
    found = list(_other_plain(first, other))
    if not found and _ran(first) and _ran(other):
        a, b = (f"rank {t.configuration.rank}" for t in (first, other))
        found = list(_other_collectives(first, other, "X5", a, b))
    yield from found


def _other_plain(first: Trace, other: Trace) -> Found:
    """The first operation on what is alike on the ranks that is not alike itself."""
    axes = _shared_axes(first, other)
    if not axes:
        return
    trusted = {axis: _true_reads(first, other, axis) for axis in axes}
    made = {axis: _other_factories(first, other, trusted[axis]) for axis in axes}
    for point, passes in first.record.points.items():
        twins = other.record.points.get(point, [])
        for a, b in zip(passes, twins, strict=False):
            if _both_even(a, b, axes):
                yield other, _uneven(point, a, b, first, other)
                return
            # Of what comes after, offsets and sizes may be data that mirror images tell untruly.
            true = {axis for axis in axes if max(a.reads, b.reads) <= trusted[axis]}
            axis = _differs_alone(point.op, a, b, true) or _mixes(b, made, true)
            if axis is not None and not allowed("rank", *point.lines[-1]):
                yield other, _depends_on_rank(point, axis, first, other)
                return
    yield from _done_by_one(first, other, trusted)


def _true_reads(first: Trace, other: Trace, axis: str) -> int:
    """How many reads of data give each rank what it would have in a world of many.

    What is V on the axis, and came out of no collective, is the rank's own and may differ. All else
    is a mirror image if the ranks do not agree about it.
    """
    pairs = zip(first.record.reads, other.record.reads, strict=False)
    for number, ((_, x, of), (_, y, its)) in enumerate(pairs):
        if x != y and not (dict(of).get(axis) == dict(its).get(axis) == "V"):
            return number
    return min(len(first.record.reads), len(other.record.reads))


def _other_factories(first: Trace, other: Trace, reads: int) -> set[object]:
    """The factories to which the ranks gave other numbers."""
    return {
        (point, number)
        for point, passes in first.record.points.items()
        for number, (a, b) in enumerate(
            zip(passes, other.record.points.get(point, []), strict=False), 1
        )
        if not a.operands and a.plain != b.plain and max(a.reads, b.reads) <= reads
    }


def _mixes(seen: Seen, made: Mapping[str, Set[object]], axes: set[str]) -> str | None:
    """The axis on which all is alike except results of a factory, and the result is, too."""
    for axis in sorted(axes):
        varied = [bool(x.made_of.factories & made[axis]) for x in seen.operands]
        whole = [not x.made_of.pure for x in seen.operands]
        if any(varied) and any(whole) and _stays(seen, axis):
            return axis
    return None


def _done_by_one(first: Trace, other: Trace, trusted: Mapping[str, int]) -> Found:
    """What the module was given, and is alike on both, is worked on by one of them alone."""
    for mine, theirs in ((first, other), (other, first)):
        for point, passes in mine.record.points.items():
            for seen in passes[len(theirs.record.points.get(point, [])) :]:
                fed = any(x.made_of.fed for x in seen.operands)
                true = (axis for axis, reads in sorted(trusted.items()) if seen.reads <= reads)
                axis = next((axis for axis in true if fed and _stays(seen, axis)), None)
                if axis is not None and not allowed("rank", *point.lines[-1]):
                    yield other, _depends_on_rank(point, axis, first, other)
                    return


def _stays(seen: Seen, axis: str) -> bool:
    """Nothing that goes in or comes out is V on the axis."""
    kinds = [dict(types).get(axis) for types in (*(x.types for x in seen.operands), *seen.results)]
    return bool(seen.results) and all(kind in ("R", "I", "P") for kind in kinds)


def _both_even(a: Seen, b: Seen, axes: set[str]) -> bool:
    """Both say that every rank of the axis has as many rows as they have, and have not."""
    return a.even is not None and b.even is not None and a.even[0] in axes and a.even != b.even


def _uneven(point: Point, a: Seen, b: Seen, first: Trace, other: Trace) -> Finding:
    assert a.even is not None and b.even is not None
    sides = ((first, a.even), (other, b.even))
    have = ", ".join(
        f"rank {t.configuration.rank} has {plural(rows, 'row')}" for t, (_, rows) in sides
    )
    return finding(
        "X5",
        point.at,
        point.op,
        f"{have}, and each takes all ranks of {a.even[0]} to have as many",
        "ranks then wait for more than others send, or read one rank's rows as another's",
        "redistribute(x, axis, ..., shape=ShardShape.even(tokens, axis.size))",
        "ShardShape.ragged(sizes)   # with the sizes that the ranks have told each other",
    )


_SCALES = {"mul", "div", "__mul__", "__rmul__", "__truediv__", "mul_", "div_", "__imul__"}


def _differs_alone(op: str, a: Seen, b: Seen, axes: set[str]) -> str | None:
    """The axis on which all operands are alike on both ranks, though the operations differ."""
    for axis in sorted(axes):
        pairs = list(zip(a.operands, b.operands, strict=False))
        alike = [_alike(x, axis) and _alike(y, axis) and x.shape == y.shape for x, y in pairs]
        offsets = any(
            x.offset != y.offset for (x, y), same in zip(pairs, alike, strict=True) if same
        )
        if offsets:
            return axis
        if not pairs or a.plain == b.plain:
            continue
        if all(alike) and all(x.total == y.total for x, y in pairs):
            return axis
        parts = [dict(o.types).get(axis) == "P" for pair in pairs for o in pair]
        if op in _SCALES and all(parts):
            return axis
    return None


def _alike(x: Operand, axis: str) -> bool:
    return dict(x.types).get(axis) in ("R", "I")


def _shared_axes(first: Trace, other: Trace) -> set[str]:
    """The axes along which the two ranks stand in one group, at different places."""
    layout = first.configuration.layout
    a, b = layout.place(first.configuration.rank), layout.place(other.configuration.rank)
    return {
        role.name
        for roles in (DENSE, EXPERT)
        for role in roles
        if a[role] != b[role] and all(a[r] == b[r] for r in roles if r is not role)
    }


def _depends_on_rank(point: Point, axis: str, first: Trace, other: Trace) -> Finding:
    ranks = f"{first.configuration.rank} and {other.configuration.rank}"
    return finding(
        "X2",
        point.at,
        point.op,
        f"ranks {ranks} do different things to what is one thing on all ranks of {axis}",
        "a slice, a mask or a factor by a plain number of this rank keeps the type of the whole, "
        "so what the ranks hold is no longer what the type says, and its gradient is not summed",
        *(_OWN_NUMBERS if point.op.strip("_") in _COMPARISONS else ()),
        "redistribute(x, axis, src=R, dst=S(0), shape=...)   # cuts out this rank's part, as a V",
    )


# `ids == rank * own + e`, as blocks select the tokens of an expert.
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "isin")
_OWN_NUMBERS = (
    "own = redistribute(torch.arange(n), axis, src=R, dst=S(0))   # own[e] for rank * n_own + e",
)


# --- collectives --------------------------------------------------------------------------------


def _other_collectives(a: Trace, b: Trace, rule: str, name_a: str, name_b: str) -> Found:
    for when in ("forward", "backward"):
        one, two = getattr(a, when), getattr(b, when)
        for number in range(max(len(one), len(two))):
            x, y = (_at(issued, number) for issued in (one, two))
            if x is None or y is None or _key(x) != _key(y) or _misfit(a, b, when, number, rule):
                yield b, _other(rule, when, number, (name_a, x), (name_b, y))
                return


def _at(issued: list[Issued], number: int) -> Issued | None:
    return issued[number] if number < len(issued) else None


def _key(issued: Issued) -> tuple[object, ...]:
    """What the ranks of every group must agree about."""
    first = issued.group[0]
    return issued.op, tuple(rank - first for rank in issued.group), issued.dtype


def _misfit(a: Trace, b: Trace, when: str, number: int, rule: str) -> bool:
    """Other shapes on ranks of one group; sizes that were read from data are not comparable."""
    x, y = getattr(a, when)[number], getattr(b, when)[number]
    reads = [before for before, *_ in a.record.reads[_same_reads(a, b) :]]
    comparable = when == "forward" and x.group == y.group and number < min(reads, default=10**9)
    return rule == "X5" and comparable and x.op != "all_to_all" and x.shape != y.shape


def _other(rule: str, when: str, number: int, *sides: tuple[str, Issued | None]) -> Finding:
    what = ", ".join(f"with {name} {_said(issued)}" for name, issued in sides)
    issued = next(i for _, i in sides if i is not None)
    at = (
        "backward"
        if issued.caller is None
        else f"{short_path(issued.caller[0])}:{issued.caller[1]}"
    )
    return finding(
        rule,
        at,
        f"{when}, collective {number}",
        what,
        "ranks that do not issue the same collectives deadlock, or mix up data",
        "issue it on every rank, with no rows where there are none; hand redistribute the shape",
    )


def _said(issued: Issued | None) -> str:
    if issued is None:
        return "there is none"
    return f"it is {issued.op} of {list(issued.shape)} over {plural(len(issued.group), 'rank')}"
