"""Error messages of the static check: what is there and needed, why, and what to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

from mypy.nodes import CallExpr, Expression, IndexExpr, MemberExpr, NameExpr, RefExpr

from spmd_moe.core.messages import notes
from spmd_moe.static.kinds import (
    Kinds,
    fits,
    is_shard,
    kind_on,
    letter,
    on_presentation,
    presentation,
)
from spmd_moe.static.operator_rules import (
    Operand,
    Refusal,
    infer_operation,
    is_move,
    moves_from,
    table,
    takes_part,
)


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """One error before it is reported. `code` is the part after `placement-`."""

    code: str
    what: str
    why: str
    fixes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The notes below the error."""
        return notes(self.why, self.fixes)


def named(expr: Expression | None) -> str:
    """A short source text for an expression."""
    if isinstance(expr, NameExpr):
        return expr.name
    if isinstance(expr, MemberExpr):
        return f"{named(expr.expr)}.{expr.name}"
    if isinstance(expr, CallExpr) and isinstance(expr.callee, RefExpr):
        return f"{named(expr.callee)}(...)"
    if isinstance(expr, IndexExpr):
        return f"{named(expr.base)}[...]"
    return "(...)"


def move_text(x: str, role: str, src: str, dst: str) -> str:
    """A move as one writes it, and what it does."""
    example = "S(0)" if dst == "S" else dst
    does = table()["moves_do"].get(f"{'S' if is_shard(src) else src} {dst}", "")
    return f"redistribute({x}, mesh[{role}], src={src}, dst={example})   # {does}"


# --- operations -------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Named:
    """An operand, and what it is called in the source."""

    operand: Operand
    text: str


def operation_problem(name: str, operands: Sequence[Named], refusal: Refusal) -> Problem:
    """An operation whose operands do not go together."""
    short = name.removeprefix("Tensor.").strip("_")
    role = refusal.role
    have = [
        f"{n.text} is {kind}"
        for n in operands
        if n.operand.kinds is not None and (kind := kind_on(n.operand.kinds, role)) is not None
    ]
    numbers = [n for n in operands if n.operand.kinds is None and takes_part(name, n.operand)]
    having = " and ".join(dict.fromkeys(have)) + f" on {role}"
    with_numbers = ", and a number joins" if numbers and have else ""
    return Problem(
        "operation",
        f"{short}: {having}{with_numbers}",
        refusal.why,
        tuple(_fixes(name, operands, role))[:3],
    )


def _fixes(name: str, operands: Sequence[Named], role: str) -> Iterator[str]:
    """Moves of one operand after which the operation type-checks: each was tried."""
    for i, n in enumerate(operands):
        kinds = n.operand.kinds
        have = None if kinds is None else kind_on(kinds, role)
        if kinds is None or have is None:
            continue
        for dst in moves_from(have):
            moved = replace(n.operand, kinds={**kinds, role: "S(0)" if dst == "S" else dst})
            tried = [moved if j == i else other.operand for j, other in enumerate(operands)]
            _, refusal = infer_operation(name, tried)
            if refusal is None:
                yield move_text(n.text, role, have, dst)


# --- what is declared -------------------------------------------------------------------------


def declared_problem(code: str, where: str, x: str, have: Kinds, need: Kinds) -> Problem | None:
    """A value that is not placed as it is declared; None if it is."""
    seen = on_presentation(have, presentation(need))
    if seen is None:
        return Problem(
            code,
            f"{where}: {x} is {_words(have)}, and {_words(need)} is needed",
            "between the two meshes only what is the same on every axis carries over",
            ("redistribute to one kind on every axis first",),
        )
    for role, wanted in need.items():
        found = kind_on(seen, role)
        constant = role not in seen  # of a factory: no gradient, so it may be taken for R, I or V
        if found is None or fits(found, wanted) or (constant and wanted != "P"):
            continue
        return Problem(
            code,
            f"{where}: {x} is {found} on {role}, and {wanted} is needed",
            _why_differs(found, wanted),
            _declared_fixes(x, role, found, wanted),
        )
    return None


def _words(kinds: Kinds) -> str:
    return ", ".join(f"{kind} on {role}" for role, kind in kinds.items())


def _declared_fixes(x: str, role: str, have: str, need: str) -> tuple[str, ...]:
    dst = letter("S" if need == "V" else need)
    if have != "V" and is_move(have, dst):
        return (move_text(x, role, have, dst),)
    if have == "V" and need == "P":
        return (f"declare_sum({x}, mesh[{role}])   # if it is a part of a sum",)
    if have == "V":
        joined = move_text(x, role, "S(0)", dst) + ", if the ranks' tensors joined are the whole"
        summed = move_text(f"declare_sum({x}, mesh[{role}])", role, "P", dst)
        return joined, f"{summed}, if the ranks' tensors are parts of a sum"
    return (f"declare it {role}[{have}]",)


def _why_differs(have: str, need: str) -> str:
    return _WHY.get((have[0], need[0]), "the two are different things on every rank")


_WHY = {
    ("P", "R"): "the sum over the ranks is still to be taken",
    ("P", "I"): "the sum over the ranks is still to be taken",
    ("P", "V"): "every rank has a part of a sum, not something of its own",
    ("P", "S"): "every rank has a part of a sum, not its rows of it",
    ("R", "I"): "its gradient is a part of a sum, where that of I is the same on every rank",
    ("I", "R"): "its gradient is the same on every rank, where that of R is summed over the ranks",
    ("R", "P"): "a sum over the ranks would count it once for every rank",
    ("I", "P"): "a sum over the ranks would count it once for every rank",
    ("V", "R"): "every rank has something of its own, not the whole",
    ("S", "R"): "every rank has its rows, not the whole",
    ("V", "I"): "every rank has something of its own, not the whole",
    ("S", "I"): "every rank has its rows, not the whole",
    ("V", "P"): "nothing says that what the ranks have are parts of one sum",
    ("S", "P"): "joining the rows, not adding them, makes the whole",
    ("R", "V"): "every rank has the whole, not something of its own",
    ("R", "S"): "every rank has the whole, not its rows",
    ("I", "V"): "every rank has the whole, not something of its own",
    ("I", "S"): "every rank has the whole, not its rows",
    ("S", "S"): "the two are cut along different dims",
}


# --- moves ------------------------------------------------------------------------------------


def source_problem(function: str, x: str, role: str, have: str, src: str) -> Problem:
    fixes = [f"src={have}"] if moves_from(have) else []
    if is_move(have, src):
        fixes.append(move_text(x, role, have, "S" if is_shard(src) else src))
    return Problem(
        "move",
        f"{function}: {x} is {have} on {role}, but src={src}",
        _why_differs(have, src),
        tuple(fixes) or ((f"declare_sum({x}, ...)",) if src == "P" else ()),
    )


def no_move_problem(function: str, x: str, src: str, dst: str, to: Sequence[str]) -> Problem:
    return Problem(
        "move",
        f"{function}: no move {src} -> {dst}; from {src} one can go to {', '.join(to) or 'none'}",
        "V does not say how the tensors of the ranks belong together"
        if "V" in (src, dst)
        else f"{function} does something else",
        tuple(f"dst={'S(dim)' if kind == 'S' else kind}" for kind in to)
        or ("src=S(dim)   # if the tensors of all ranks, joined along dim, are the whole",),
    )
