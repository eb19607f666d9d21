"""Strict mode, for modules that want it: every tensor is placed, and nothing goes past the checker.

Reported is where not knowing begins: a parameter, an attribute or a result that is declared without
a placement, and an expression that has none although all that it is made of has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mypy.nodes import (
    AssignmentStmt,
    AwaitExpr,
    CallExpr,
    CastExpr,
    ClassDef,
    ComparisonExpr,
    ConditionalExpr,
    Context,
    Expression,
    FuncDef,
    IndexExpr,
    MemberExpr,
    NameExpr,
    Node,
    OpExpr,
    RefExpr,
    TupleExpr,
    UnaryExpr,
    Var,
)
from mypy.types import CallableType, Instance, Type, TypeVarType, get_proper_type

from spmd_moe.static.messages import Problem, named
from spmd_moe.static.placed_types import is_any, kinds_of, placed_within, tensor, tensors_in
from spmd_moe.static.syntax_tree import children

TypeOf = Callable[[Expression], Type | None]
Found = Iterator[tuple[Problem, Context]]

MADE = (
    CallExpr | OpExpr | UnaryExpr | ComparisonExpr | IndexExpr | MemberExpr | CastExpr | AwaitExpr
)
_KERNELS = "torch.autograd.function.Function"  # below types: they have rules of their own


def unknown_problems(node: Node, type_of: TypeOf, declared: bool = False) -> Found:
    """Tensors of which nothing is known; `declared`: the node goes straight to a declared name."""
    if isinstance(node, ClassDef):
        if is_kernel(node):
            return
        yield from _attributes(node)
    elif isinstance(node, FuncDef):
        yield from _signature(node)
    elif isinstance(node, MADE) and not declared and _begins_here(node, type_of):
        what = f"{named(node)}: nothing is known of its placement"
        yield _problem(what, "declare what it is made by, or assign it to a declared name"), node
    for child in children(node):
        covered = _is_declared(node, child, type_of)
        if isinstance(node, ConditionalExpr | TupleExpr | CastExpr):
            covered = declared
        yield from unknown_problems(child, type_of, covered)


def _is_declared(node: Node, child: Node, type_of: TypeOf) -> bool:
    """Whether an expression goes straight to a declared name: a variable, attribute or field."""
    if isinstance(node, AssignmentStmt):
        targets = [t for target in node.lvalues for t in _names_in(target)]
        return child is node.rvalue and all(_is_placed(_declared_type(t, type_of)) for t in targets)
    if isinstance(node, CallExpr) and child is not node.callee:
        callee = get_proper_type(type_of(node.callee))
        return isinstance(callee, CallableType) and callee.is_type_obj()
    return False


def _is_placed(t: Type | None) -> bool:
    return t is not None and placed_within(t)


def _names_in(target: Expression) -> list[Expression]:
    return list(target.items) if isinstance(target, TupleExpr) else [target]


def _declared_type(target: Expression, type_of: TypeOf) -> Type | None:
    variable = target.node if isinstance(target, NameExpr) else None
    if isinstance(target, MemberExpr):
        owner = get_proper_type(type_of(target.expr))
        found = owner.type.get(target.name) if isinstance(owner, Instance) else None
        variable = None if found is None else found.node
    return variable.type if isinstance(variable, Var) and not variable.is_inferred else None


def is_kernel(node: ClassDef) -> bool:
    return any(base.fullname == _KERNELS for base in node.info.mro)


def _attributes(node: ClassDef) -> Found:
    for statement in node.defs.body:
        if not isinstance(statement, AssignmentStmt) or statement.unanalyzed_type is None:
            continue
        for target in statement.lvalues:
            variable = target.node if isinstance(target, NameExpr) else None
            if isinstance(variable, Var) and _is_unknown(variable.type):
                what = f"{node.name}.{variable.name}: it is declared without a placement"
                yield _problem(what, f"{variable.name}: Placed[Tensor, ...]"), statement


def _signature(function: FuncDef) -> Found:
    if not isinstance(function.type, CallableType):
        return
    for argument, t in zip(function.arguments, function.type.arg_types, strict=True):
        if _is_unknown(t) and argument.line > 0:  # not what mypy adds to a dataclass
            name = argument.variable.name
            what = f"{function.name}, argument {name}: it is declared without a placement"
            yield _problem(what, f"{name}: Placed[Tensor, ...]"), argument
    if _is_unknown(function.type.ret_type):
        what = f"{function.name}: its result is declared without a placement"
        yield _problem(what, "-> Placed[Tensor, ...]"), function


def _begins_here(node: Expression, type_of: TypeOf) -> bool:
    t = type_of(node)
    operands = [type_of(e) for e in _operands(node)]
    if is_any(t):  # an untyped call; a cast of it is reported instead
        if not isinstance(node, CallExpr) or _is_raw(node.callee):  # raw collectives: see bypass
            return False
        return any(map(_has_tensor, operands))
    return _is_unknown(t) and not any(map(_is_open, operands))


def _is_raw(callee: Expression) -> bool:
    return isinstance(callee, RefExpr) and callee.fullname.startswith("torch.distributed.")


def _operands(node: Node) -> Iterator[Expression]:
    for child in children(node):
        if isinstance(node, CallExpr) and child is node.callee:
            if isinstance(child, MemberExpr):
                yield child.expr
        elif isinstance(child, Expression):
            yield child
            if not isinstance(child, MADE):  # a list of tensors, a slice
                yield from _operands(child)


def _is_unknown(t: Type | None) -> bool:
    return tensor(t) is not None and kinds_of(t) is None


def _is_open(t: Type | None) -> bool:
    """Unknown already, or of a type variable, which stands for any type."""
    p = None if t is None else get_proper_type(t)
    return _is_unknown(p) or (isinstance(p, TypeVarType) and tensor(p.upper_bound) is not None)


def _has_tensor(t: Type | None) -> bool:
    return t is not None and any(True for _ in tensors_in(t))


def _problem(what: str, fix: str) -> Problem:
    why = "this module is strict, so that no tensor goes unchecked"
    return Problem("unknown", what, why, (fix, "# spmd: allow unknown - <reason>"))
