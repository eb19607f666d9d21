"""Effects of collectives on kinds: ours, and those of spmd_types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from spmd_moe.static.kinds import (
    PRESENTATIONS,
    REPORTED,
    Kinds,
    fits,
    kind_on,
    letter,
    on_presentation,
    presentation,
)
from spmd_moe.static.messages import Problem, no_move_problem, source_problem
from spmd_moe.static.operator_rules import is_move, moves_from, table

# Full names, and the row of `transitions` that says which pairs there are. None: our own moves.
COLLECTIVES: Mapping[str, str | None] = {
    "spmd_moe.core.redistribute.redistribute": None,
    "spmd_moe.core.collectives.declare_sum": "reinterpret",
    "spmd_types._collectives.redistribute": None,
    **{
        f"spmd_types._collectives.{name}": name
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    },
    "spmd_types._local.convert": "convert",
    "spmd_types._local.shard": "convert",
    "spmd_types._local.reinterpret": "reinterpret",
    "spmd_types._local.invariant_to_replicate": "convert",
}
# Between the roles of a loop's axis, which is each of them in turn.
SEVERAL = "|"
EXCHANGE = "spmd_moe.core.collectives.exchange"

# Calls that make ranks meet: what must not hang on a shape, nor stand where gradients are off.
MEETINGS = frozenset({*COLLECTIVES, EXCHANGE, "spmd_moe.core.collectives.move"})


@final
@dataclass(frozen=True, slots=True)
class Call:
    """A call of a collective as far as it can be read. None is what could not."""

    function: str
    x: str
    kinds: Kinds | None
    role: str | None
    src: str | None
    dst: str | None


def moved(call: Call) -> tuple[Kinds | None, Problem | None]:
    """Kinds of the result. After an error, what the caller believes he gets."""
    short = call.function.rpartition(".")[2]
    problem = _pair_problem(call, short)
    if call.role is not None and SEVERAL in call.role:
        return _on_each(call, short, problem)
    if call.role is None:
        call = replace(call, role=_only_axis(call))
    kinds = call.kinds
    if call.role is None:
        return _on_some_axis(call, short, problem)
    if kinds is not None:
        kinds = on_presentation(kinds, _presentation_of(call.role)) or kinds
        have = kind_on(kinds, call.role)
        if have is not None and call.src is not None and not fits(have, call.src):
            problem = problem or source_problem(short, call.x, call.role, have, call.src)
    result = dict(kinds or {})
    result.pop(call.role, None)
    if call.dst is not None:
        result[call.role] = call.dst
    elif kinds is not None and call.role in kinds:
        result[call.role] = REPORTED
    return (result if result else None), problem


def _pair_problem(call: Call, short: str) -> Problem | None:
    src, dst = call.src, call.dst
    if src is None or dst is None:
        return None
    row = COLLECTIVES[call.function]
    if row is None:
        if is_move(src, dst):
            return None
        return no_move_problem(short, call.x, src, dst, list(moves_from(src)))
    pairs = [pair.split(" ") for pair in table()["transitions"][row]]
    if [letter(src), letter(dst)] in pairs:
        return None
    return no_move_problem(short, call.x, src, dst, [d for s, d in pairs if s == letter(src)])


def _on_some_axis(
    call: Call, short: str, problem: Problem | None
) -> tuple[Kinds | None, Problem | None]:
    """The axis is not known: one of those on which the tensor is `src`, if there is any."""
    if call.kinds is None or call.src is None:
        return None, problem
    may_be = [role for role, kind in call.kinds.items() if fits(kind, call.src)]
    if not may_be and call.kinds:
        role, kind = next(iter(call.kinds.items()))
        problem = problem or source_problem(short, call.x, role, kind, call.src)
    unsure = dict.fromkeys(may_be, REPORTED)
    return {**call.kinds, **unsure}, problem


def _only_axis(call: Call) -> str | None:
    """The axis, where all is known of a tensor and it is `src` on one axis only."""
    kinds = call.kinds or {}
    roles = presentation(kinds) or ()
    if call.src is None or not roles or any(kind_on(kinds, role) is None for role in roles):
        return None
    may_be = [role for role in kinds if fits(kinds[role], call.src)]
    return may_be[0] if len(may_be) == 1 else None


def _on_each(
    call: Call, short: str, problem: Problem | None
) -> tuple[Kinds | None, Problem | None]:
    """A loop over axes: the tensor is moved on one after the other, and in the end on all of them.

    The body is seen with the tensor as it came, and with it as it was left by the round before.
    """
    roles = (call.role or "").split(SEVERAL)
    kinds = dict(on_presentation(call.kinds or {}, _presentation_of(roles[0])) or call.kinds or {})
    have = {role: kind for role in roles if (kind := kind_on(kinds, role)) is not None}
    wrong = [_not_fitting(have, kind) for kind in (call.src, call.dst)]
    if call.src is not None and all(wrong):
        role = wrong[0][0]
        problem = problem or source_problem(short, call.x, role, have[role], call.src)
    return {**kinds, **dict.fromkeys(roles, call.dst or REPORTED)}, problem


def _not_fitting(have: Kinds, kind: str | None) -> list[str]:
    return [role for role, found in have.items() if kind is None or not fits(found, kind)]


def _presentation_of(role: str) -> tuple[str, ...] | None:
    return next((roles for roles in PRESENTATIONS if role in roles), None)
