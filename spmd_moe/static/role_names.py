"""Role variables: `TP`, another name for it such as `EAST = TP`, or a role of the user's own.

The role is kept in the variable's type, which other names of it inherit and mypy's cache keeps. In
the module that is being read variables have no types yet; there the assignment is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mypy.nodes import (
    AssignmentStmt,
    CallExpr,
    Expression,
    ListExpr,
    MypyFile,
    NameExpr,
    RefExpr,
    StrExpr,
    TupleExpr,
    Var,
)
from mypy.types import AnyType, Instance, get_proper_type

from spmd_moe.static.placed_types import role_of

ROLE = "spmd_moe.core.placement.Role"
Modules = Mapping[str, MypyFile]
_STEPS = 8  # names of names that are followed


def is_role(variable: Var) -> bool:
    """For the end of the check, when the type of every variable is known."""
    t = None if variable.type is None else get_proper_type(variable.type)
    if t is None or isinstance(t, AnyType):
        return True
    return isinstance(t, Instance) and any(base.fullname == ROLE for base in t.type.mro)


def role_name(variable: Var, modules: Modules, steps: int = _STEPS) -> str | None:
    """The name that stands for a role; None where an annotation hides which role it is."""
    known = role_of(variable.type)
    if known is not None:
        return known
    if variable.type is not None and not variable.is_inferred and is_role(variable):
        return None
    tree = modules.get(variable.fullname.rpartition(".")[0])
    for value in () if tree is None else _values(tree, variable.name):
        made = role_made_by(value)
        if made is not None:
            return made
        other = value.node if isinstance(value, RefExpr) else None
        if isinstance(other, Var) and steps:
            return role_name(other, modules, steps - 1)
    return variable.name


def role_made_by(value: Expression) -> str | None:
    """`Role("north")` is NORTH, as it prints itself."""
    if isinstance(value, CallExpr) and isinstance(value.callee, RefExpr) and value.args:
        name = value.args[0]
        if value.callee.fullname == ROLE and isinstance(name, StrExpr):
            return name.value.upper()
    return None


def _values(tree: MypyFile, name: str) -> Iterator[Expression]:
    """What is assigned to a name of a module."""
    for statement in tree.defs:
        if isinstance(statement, AssignmentStmt):
            for target in statement.lvalues:
                yield from _value(target, statement.rvalue, name)


def _value(target: Expression, value: Expression, name: str) -> Iterator[Expression]:
    if isinstance(target, NameExpr):
        if target.name == name:
            yield value
    elif isinstance(target, TupleExpr | ListExpr) and isinstance(value, TupleExpr | ListExpr):
        for t, v in zip(target.items, value.items, strict=False):
            yield from _value(t, v, name)
