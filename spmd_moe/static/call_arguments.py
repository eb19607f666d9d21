"""Arguments of a call matched with the parameters of the overload that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mypy.argmap import map_actuals_to_formals
from mypy.checker import infer_operator_assignment_method
from mypy.erasetype import erase_typevars
from mypy.nodes import (
    ARG_NAMED,
    ARG_POS,
    ARG_STAR,
    ARG_STAR2,
    ArgKind,
    CallExpr,
    ComparisonExpr,
    DictExpr,
    Expression,
    IndexExpr,
    ListExpr,
    Node,
    OperatorAssignmentStmt,
    OpExpr,
    StarExpr,
    StrExpr,
    TupleExpr,
)
from mypy.operators import op_methods
from mypy.subtypes import find_member, is_subtype
from mypy.types import (
    AnyType,
    CallableType,
    Instance,
    Overloaded,
    TupleType,
    Type,
    TypedDictType,
    TypeOfAny,
    UnionType,
    get_proper_type,
)

from spmd_moe.static.module_calls import placed_forward
from spmd_moe.static.placed_types import placed_within

TypeOf = Callable[[Expression], Type | None]
PARTIAL = "functools.partial"


@dataclass(frozen=True)
class Actual:
    """An argument as it is given. An item of what stands behind a star has a type of its own."""

    expr: Expression
    kind: ArgKind = ARG_POS
    name: str | None = None
    type: Type | None = None


Match = tuple[Actual, str | None, Type]


def signatures(callee: Type | None) -> Iterator[list[CallableType]]:
    """What may be called, each with its overloads; of a module, its forward."""
    t = None if callee is None else get_proper_type(callee)
    if isinstance(t, CallableType):
        yield [t]
    elif isinstance(t, Overloaded):
        yield t.items
    elif isinstance(t, UnionType):
        for item in t.items:
            yield from signatures(item)
    elif isinstance(t, Instance):
        forward = placed_forward(t)
        if forward is not None:
            yield [forward]
        elif t.type.fullname == PARTIAL:
            attrs = {} if t.extra_attrs is None else t.extra_attrs.attrs
            yield from signatures(attrs.get("__mypy_partial"))
        elif "__call__" in {name for base in t.type.mro for name in base.names}:
            yield from signatures(_method("__call__", t))


def actuals(call: CallExpr, type_of: TypeOf) -> list[Actual]:
    """The arguments of a call, with those behind stars one by one where they are known."""
    given = zip(call.args, call.arg_kinds, call.arg_names, strict=True)
    return [a for expr, kind, name in given for a in _given(expr, kind, name, type_of)]


def _given(expr: Expression, kind: ArgKind, name: str | None, type_of: TypeOf) -> Iterator[Actual]:
    t = None if kind not in (ARG_STAR, ARG_STAR2) else get_proper_type(type_of(expr))
    if kind == ARG_STAR and isinstance(expr, TupleExpr | ListExpr) and not _has_stars(expr):
        yield from (Actual(item) for item in expr.items)
    elif kind == ARG_STAR and isinstance(t, TupleType):
        yield from (Actual(expr, type=item) for item in t.items)
    elif kind == ARG_STAR2 and isinstance(expr, DictExpr):
        for key, value in expr.items:
            if isinstance(key, StrExpr):
                yield Actual(value, ARG_NAMED, key.value)
    elif kind == ARG_STAR2 and isinstance(t, TypedDictType):
        yield from (Actual(expr, ARG_NAMED, key, item) for key, item in t.items.items())
    else:
        yield Actual(expr, kind, name)


def _has_stars(expr: TupleExpr | ListExpr) -> bool:
    return any(isinstance(item, StarExpr) for item in expr.items)


def matched(given: Sequence[Actual], signature: CallableType, type_of: TypeOf) -> Iterator[Match]:
    """Each argument with the name and type of its parameter."""
    for actual, formal in _pairs(given, signature, type_of):
        name, t = signature.arg_names[formal], signature.arg_types[formal]
        if actual.kind in (ARG_STAR, ARG_STAR2):
            item = _item_of(actual, type_of)
            if item is not None:
                yield Actual(actual.expr, ARG_POS, type=item), name, t
        else:
            yield actual, name, t


def _pairs(
    given: Sequence[Actual], signature: CallableType, type_of: TypeOf
) -> Iterator[tuple[Actual, int]]:
    kinds, names = [a.kind for a in given], [a.name for a in given]
    formals = map_actuals_to_formals(
        kinds,
        names,
        signature.arg_kinds,
        signature.arg_names,
        lambda i: _type(given[i], type_of),
    )
    for formal, positions in enumerate(formals):
        yield from ((given[i], formal) for i in positions)


def _type(actual: Actual, type_of: TypeOf) -> Type:
    return actual.type or type_of(actual.expr) or AnyType(TypeOfAny.special_form)


def _item_of(actual: Actual, type_of: TypeOf) -> Type | None:
    """What a list or a dict of any length holds, behind a star."""
    t = get_proper_type(_type(actual, type_of))
    args = t.args if isinstance(t, Instance) else ()
    if actual.kind == ARG_STAR:
        return args[0] if len(args) == 1 else None
    return args[1] if len(args) == 2 else None


def fitting(
    overloads: list[CallableType], given: Sequence[Actual], type_of: TypeOf
) -> list[CallableType]:
    """Those that mypy may have chosen; none where no placement is in any."""
    if len(overloads) == 1:
        return overloads
    if not any(placed_within(t) for item in overloads for t in item.arg_types):
        return []
    return [item for item in overloads if _fits(item, given, type_of)]


def _fits(signature: CallableType, given: Sequence[Actual], type_of: TypeOf) -> bool:
    pairs = list(_pairs(given, signature, type_of))
    filled = {formal for _, formal in pairs}
    required = {i for i, kind in enumerate(signature.arg_kinds) if kind.is_required()}
    if required - filled or {id(a) for a in given} != {id(a) for a, _ in pairs}:
        return False
    found = matched(given, signature, type_of)
    return all(is_subtype(_type(a, type_of), erase_typevars(t)) for a, _, t in found)


def operator_calls(node: Node, type_of: TypeOf) -> Iterator[tuple[str, Type | None, Expression]]:
    """The methods that operators call: how they are written, their types, and their argument."""
    if isinstance(node, OpExpr):
        yield node.op, node.method_type, _operand(node.method_type, node.left, node.right, type_of)
    elif isinstance(node, IndexExpr):
        yield "[...]", node.method_type, node.index
    elif isinstance(node, ComparisonExpr):
        for op, left, right in zip(node.operators, node.operands, node.operands[1:], strict=False):
            if op in ("in", "not in"):
                yield op, _method("__contains__", type_of(right)), left
            elif op in op_methods:
                yield op, _method(op_methods[op], type_of(left)), right
    elif isinstance(node, OperatorAssignmentStmt):
        t = get_proper_type(type_of(node.lvalue))
        if t is not None:
            _, name = infer_operator_assignment_method(t, node.op)
            yield f"{node.op}=", _method(name, t), node.rvalue


def _method(name: str, receiver: Type | None) -> Type | None:
    t = get_proper_type(receiver)
    return find_member(name, t, t, is_operator=True) if isinstance(t, Instance) else None


def _operand(
    method: Type | None, left: Expression, right: Expression, type_of: TypeOf
) -> Expression:
    """The argument: what stands on the right, unless the method is a reflected one."""
    have = type_of(right)
    for overloads in signatures(method):
        needs = [item.arg_types[0] for item in overloads if item.arg_types]
        if have is not None and any(is_subtype(have, erase_typevars(need)) for need in needs):
            return right
    return left
