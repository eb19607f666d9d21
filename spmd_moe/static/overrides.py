"""A method that is placed differently from the one that it overrides."""

from __future__ import annotations

from mypy.nodes import Decorator, FuncDef, OverloadedFuncDef
from mypy.types import CallableType, Type

from spmd_moe.static.messages import Problem, declared_problem
from spmd_moe.static.types import kinds_of, signature_of

_NOT_COMPARED = frozenset({"__init__", "__new__", "__post_init__"})


def override_problem(function: FuncDef) -> Problem | None:
    """The first difference: results must be what the base promises, arguments what it takes."""
    own = _own(function)
    if own is None or function.name in _NOT_COMPARED:
        return None
    for base in function.info.mro[1:]:
        found = base.names.get(function.name)
        theirs = signature_of(found.node) if found is not None else None
        if theirs is None:
            continue
        where = f"{function.name}, as in {base.name}"
        problem = _differs(where, "result", own.ret_type, theirs.ret_type)
        for name, mine, base_type in zip(
            own.arg_names, own.arg_types, theirs.arg_types, strict=False
        ):
            problem = problem or _differs(where, name or "argument", base_type, mine)
        if problem is not None:
            return problem
    return None


def _own(function: FuncDef) -> CallableType | None:
    """Its signature in its class; None for parts of overloads, and for setters."""
    found = function.info.names.get(function.name)
    node = None if found is None else found.node
    if isinstance(node, OverloadedFuncDef):
        node = node.items[0] if node.is_property else None
    if isinstance(node, Decorator) and node.func is not function:
        return None
    return signature_of(node)


def _differs(where: str, what: str, have: Type, need: Type) -> Problem | None:
    found, wanted = kinds_of(have), kinds_of(need)
    if found is None or wanted is None:
        return None
    return declared_problem("override", where, what, found, wanted)
