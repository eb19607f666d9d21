"""Branches that place one name, or one expression, differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mypy.checker import is_unreachable_map
from mypy.nodes import (
    AssignmentStmt,
    Block,
    CallExpr,
    ConditionalExpr,
    Expression,
    FuncDef,
    LambdaExpr,
    NameExpr,
    Node,
    OpExpr,
    TupleExpr,
    Var,
)
from mypy.types import TupleType, Type, get_proper_type

from spmd_moe.static.kinds import Kinds
from spmd_moe.static.messages import Problem, declared_problem
from spmd_moe.static.placed_types import kinds_of
from spmd_moe.static.reassigned_names import grows, uses
from spmd_moe.static.syntax_tree import children

TypeOf = Callable[[Expression], Type | None]


def branch_problems(function: FuncDef, type_of: TypeOf) -> Iterator[tuple[Problem, Node]]:
    """Assignments in different blocks that do not agree. In one block, the last one counts."""
    before: dict[Var, tuple[Kinds, Block | None]] = {}
    for variable, kinds, block, where in _assigned(function.body, function.body, type_of):
        known = before.get(variable)
        before[variable] = kinds, block
        if known is None or known[1] is block:
            continue
        if uses(where.rvalue, variable) and grows(known[0], kinds):
            continue  # a sum that grows
        problem = declared_problem(
            "branch", f"{variable.name}, on one branch", variable.name, kinds, known[0]
        )
        if problem is not None:
            yield problem, where


def _assigned(
    node: Node, block: Block | None, type_of: TypeOf
) -> Iterator[tuple[Var, Kinds, Block | None, AssignmentStmt]]:
    if isinstance(node, AssignmentStmt):
        for target in node.lvalues:
            for variable, t in _targets(target, type_of(node.rvalue)):
                kinds = kinds_of(t)
                free = variable.is_inferred or variable.is_argument
                if free and kinds and not _is_exempt(node, variable):
                    yield variable, kinds, block, node
    for child in children(node):
        if not isinstance(child, FuncDef | LambdaExpr):
            yield from _assigned(child, child if isinstance(child, Block) else block, type_of)


def _is_exempt(node: AssignmentStmt, variable: Var) -> bool:
    """`_`; and what is moved over axes in a loop, by its own name, and is moved in the end."""
    call = node.rvalue
    moved = call.args[0] if isinstance(call, CallExpr) and call.args else None
    return variable.name == "_" or (isinstance(moved, NameExpr) and moved.node is variable)


def _targets(target: Expression, value: Type | None) -> Iterator[tuple[Var, Type]]:
    t = None if value is None else get_proper_type(value)
    if isinstance(target, NameExpr) and isinstance(target.node, Var) and t is not None:
        yield target.node, t
    elif isinstance(target, TupleExpr) and isinstance(t, TupleType):
        for item, item_type in zip(target.items, t.items, strict=False):
            yield from _targets(item, item_type)


def alternatives(expr: Expression, checker: Any) -> list[Expression]:
    """What the value of `x if ... else y`, or of `x or y`, may be; without what cannot run."""
    if isinstance(expr, ConditionalExpr):
        either = [expr.if_expr, expr.else_expr]
        try:
            maps = checker.find_isinstance_check(expr.cond)
        except KeyError:  # not checked: in a function without annotations
            return either
        both = zip(either, maps, strict=True)
        return [e for e, known in both if not is_unreachable_map(known)] or either
    if not isinstance(expr, OpExpr) or expr.op != "or":
        return []
    left = [] if expr.right_always else [expr.left]
    return left if expr.right_unreachable else [*left, expr.right]
