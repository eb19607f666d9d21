"""Which argument of a call meets which parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mypy.argmap import map_actuals_to_formals
from mypy.nodes import ARG_STAR, ARG_STAR2, CallExpr, Expression, FuncDef
from mypy.typeops import bind_self
from mypy.types import (
    AnyType,
    CallableType,
    Instance,
    Type,
    TypeOfAny,
    UnionType,
    get_proper_type,
)

from spmd_moe.static.modules import placed_forward

TypeOf = Callable[[Expression], Type | None]


def signatures(callee: Type | None) -> Iterator[CallableType]:
    """What may be called; the forward of a module. Overloads are left out: mypy has chosen."""
    t = None if callee is None else get_proper_type(callee)
    if isinstance(t, CallableType):
        yield t
    elif isinstance(t, UnionType):
        for item in t.items:
            yield from signatures(item)
    elif isinstance(t, Instance):
        signature = placed_forward(t) or _call_method(t)
        if signature is not None:
            yield signature


def _call_method(t: Instance) -> CallableType | None:
    found = t.type.get("__call__")
    node = None if found is None else found.node
    signature = node.type if isinstance(node, FuncDef) else None
    return bind_self(signature, t) if isinstance(signature, CallableType) else None


def matched(
    call: CallExpr, signature: CallableType, type_of: TypeOf
) -> Iterator[tuple[Expression, str | None, Type]]:
    """Each argument with the name and type of its parameter. Stars in the call are left out."""

    def actual_type(i: int) -> Type:
        return type_of(call.args[i]) or AnyType(TypeOfAny.special_form)

    formals = map_actuals_to_formals(
        call.arg_kinds, call.arg_names, signature.arg_kinds, signature.arg_names, actual_type
    )
    for formal, actuals in enumerate(formals):
        for actual in actuals:
            if call.arg_kinds[actual] not in (ARG_STAR, ARG_STAR2):
                yield call.args[actual], signature.arg_names[formal], signature.arg_types[formal]
