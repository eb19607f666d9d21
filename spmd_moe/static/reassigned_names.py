"""Names whose placement changes: sums accumulated in a loop, and reassigned parameters.

Where mypy joins a loop with the code before it, it uses the type that a name had first.
So a name that starts as R, and to which V is added, is V from its first assignment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from mypy.nodes import (
    AssignmentStmt,
    Block,
    CallExpr,
    Expression,
    FuncDef,
    MemberExpr,
    NameExpr,
    Node,
    Statement,
    Var,
    WithStmt,
)

from spmd_moe.static.kinds import ANY_ROLE, Kinds, kind_on, local, presentation, roles_of
from spmd_moe.static.placed_types import kinds_of, place
from spmd_moe.static.syntax_tree import below

_CONSTANT = frozenset(
    {"zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty"}
)


def is_constant(value: Expression | None) -> bool:
    """Whether a call makes a tensor that depends on no values, so that it has no gradient."""
    return _function(value) in _CONSTANT


def _is_fresh(value: Expression | None) -> bool:
    """Whether a tensor was made by this call, so that no other name holds it."""
    return _function(value) in _CONSTANT | {"clone"}


def _function(value: Expression | None) -> str:
    callee = value.callee if isinstance(value, CallExpr) else None
    return callee.name if isinstance(callee, MemberExpr | NameExpr) else ""


def grows(before: Kinds, after: Kinds) -> bool:
    """Whether a name that was R on some axes becomes V there, and stays what it was elsewhere."""
    each = [(kind_on(before, role), kind_on(after, role)) for role in roles_of([before, after])]
    return all(a == b or None in (a, b) or _may_grow(a, b) for a, b in each)


def _may_grow(before: str | None, after: str | None) -> bool:
    return local(after or "") == "V" and local(before or "") in ("R", "V")


def widen(checker: Any, name: Expression | None, after: Kinds) -> None:
    """From its definition on, a local name is what it is after an assignment or a change."""
    variable = name.node if isinstance(name, NameExpr) else None
    if not isinstance(variable, Var) or not variable.is_inferred:
        return
    before = kinds_of(variable.type)
    if before is None or variable.type is None or not grows(before, after):
        return
    if None not in (presentation(before), presentation(after)) and (
        presentation(before) != presentation(after)
    ):
        return
    both = _joined(before, after)
    if both != before:
        variable.type = place(variable.type, both)
        checker.widened_vars.append(variable.name)  # mypy checks the loop once more


def _joined(before: Kinds, after: Kinds) -> Kinds:
    joined = {}
    for role in roles_of([before, after]):
        kind = kind_on(after, role)
        if role == ANY_ROLE or kind is None:
            continue
        joined[role] = kind if kind == before.get(role, kind) else "V"
    return joined


class Assignments:
    """What one function assigns to its local names."""

    def __init__(self, function: object) -> None:
        self._first: dict[Var, Expression] = {}
        self._growing: dict[int, NameExpr] = {}
        for node in below(function.body) if isinstance(function, FuncDef) else ():
            if not isinstance(node, AssignmentStmt) or len(node.lvalues) != 1:
                continue
            target = node.lvalues[0]
            if isinstance(target, NameExpr) and isinstance(target.node, Var):
                self._first.setdefault(target.node, node.rvalue)
                if uses(node.rvalue, target.node):
                    self._growing[id(node.rvalue)] = target

    def target_of(self, value: object) -> NameExpr | None:
        """The name in `x = f(x, ...)`, by the expression on the right."""
        return self._growing.get(id(value))

    def began_fresh(self, name: Expression | None) -> bool:
        """Whether the first value of a local name was made there and then."""
        variable = name.node if isinstance(name, NameExpr) else None
        return isinstance(variable, Var) and _is_fresh(self._first.get(variable))


def uses(expr: Expression, variable: object) -> bool:
    return any(isinstance(node, NameExpr) and node.node is variable for node in below(expr))


def in_order(body: Block) -> Iterator[Statement]:
    """The statements of a body that run each time, one after the other."""
    for statement in body.body:
        yield statement
        if isinstance(statement, WithStmt):
            yield from in_order(statement.body)


def is_parameter(target: Node) -> TypeGuard[NameExpr]:
    return isinstance(target, NameExpr) and isinstance(target.node, Var) and target.node.is_argument
