"""Placements of type variables: a generic function returns what it was given, placed alike.

mypy takes a type variable from the context of a call too, and forgets placements where it infers
one from functions. So each call is solved once more, for placements alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mypy.nodes import Expression, FuncDef, ListExpr, StarExpr
from mypy.plugin import FunctionContext
from mypy.types import (
    CallableType,
    Instance,
    ProperType,
    TupleType,
    Type,
    TypeVarId,
    TypeVarType,
    get_proper_type,
)

from spmd_moe.static.kinds import Kinds
from spmd_moe.static.placed_types import DEPTH, items_of_both, kinds_of, place, tensor

Solved = dict[TypeVarId, Kinds]


# They yield what they are given, of any type. Other plugins have no use for them.
_OF_ANYTHING = frozenset({"contextlib.contextmanager", "contextlib.asynccontextmanager"})


def template(function: object) -> CallableType | None:
    """The signature of a function that is generic in tensors that it takes and returns."""
    t = function.type if isinstance(function, FuncDef) else None
    if not isinstance(function, FuncDef) or not isinstance(t, CallableType) or not t.variables:
        return None
    given = {variable for arg in t.arg_types for variable in _variables(arg)}
    both = given.intersection(_variables(t.ret_type))
    of_tensors = any(tensor(variable.upper_bound) is not None for variable in both)
    return t if of_tensors or (both and function.fullname in _OF_ANYTHING) else None


def _variables(t: Type) -> set[TypeVarType]:
    return {form for form, _ in _pairs(t, t)}


def result(ctx: FunctionContext, signature: CallableType) -> Type:
    """What a call returns, with the placements of what it was given."""
    solved: Solved = {}
    for form, types, exprs in zip(signature.arg_types, ctx.arg_types, ctx.args, strict=False):
        for t, expr in zip(types, exprs, strict=True):
            for variable, found in _given(ctx, form, t, expr):
                if tensor(found) is not None:
                    kinds = kinds_of(found) or {}
                    known = solved.setdefault(variable.id, kinds)
                    solved[variable.id] = kinds if known == kinds else {}
    return _placed(signature.ret_type, ctx.default_return_type, solved)


def _given(
    ctx: FunctionContext, form: Type, t: Type, expr: Expression
) -> Iterator[tuple[TypeVarType, Type]]:
    """The same of an argument; of a list that is written down, item by item: mypy joins them."""
    needed = get_proper_type(form)
    items = expr.items if isinstance(expr, ListExpr) else []
    args = needed.args if isinstance(needed, Instance) else ()
    if not items or len(args) != 1 or any(isinstance(item, StarExpr) for item in items):
        yield from _pairs(form, t)
        return
    for item in items:
        yield from _pairs(args[0], ctx.api.get_expression_type(item))


def _pairs(form: Type, t: Type, depth: int = 0) -> Iterator[tuple[TypeVarType, Type]]:
    """Each type variable in a type, with what stands there in another."""
    form, t = get_proper_type(form), get_proper_type(t)
    if isinstance(form, TypeVarType):
        yield form, t
    elif depth <= DEPTH:
        for one, other in _parts(form, t):
            yield from _pairs(one, other, depth + 1)


def _parts(form: ProperType, t: ProperType) -> Iterator[tuple[Type, Type]]:
    if isinstance(form, CallableType) and isinstance(t, CallableType):
        yield form.ret_type, t.ret_type
    yield from ((one, other) for other, one in items_of_both(t, form))


def _placed(form: Type, t: Type, solved: Solved, depth: int = 0) -> Type:
    form, t = get_proper_type(form), get_proper_type(t)
    if isinstance(form, TypeVarType):
        known = form.id in solved and tensor(t) is not None
        return place(t, solved[form.id]) if known else t
    if depth > DEPTH:
        return t
    if isinstance(form, CallableType) and isinstance(t, CallableType):
        return t.copy_modified(ret_type=_placed(form.ret_type, t.ret_type, solved, depth + 1))
    if isinstance(form, TupleType) and isinstance(t, TupleType):
        if len(form.items) != len(t.items):
            return t
        return t.copy_modified(items=_each(form.items, t.items, solved, depth))
    if isinstance(form, Instance) and isinstance(t, Instance) and form.type is t.type:
        return t.copy_modified(args=_each(form.args, t.args, solved, depth)) if t.args else t
    return t


def _each(forms: Sequence[Type], types: Sequence[Type], solved: Solved, depth: int) -> list[Type]:
    return [_placed(a, b, solved, depth + 1) for a, b in zip(forms, types, strict=True)]
