"""Overrides: a method or an attribute that is placed differently from the one in the base class."""

from __future__ import annotations

from collections.abc import Iterator

from mypy.nodes import Decorator, FuncBase, FuncDef, Node, OverloadedFuncDef, TypeInfo, Var
from mypy.types import CallableType, Type

from spmd_moe.static.messages import Problem, declared_problem
from spmd_moe.static.placed_types import kinds_of, signature_of

_NOT_COMPARED = frozenset({"__init__", "__new__", "__post_init__"})


def override_problem(function: FuncDef) -> Problem | None:
    """The first difference: results must be what the base promises, arguments what it takes."""
    own = _own(function)
    if own is None or function.name in _NOT_COMPARED or function.name.startswith("__mypy"):
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


def attribute_overrides(info: TypeInfo) -> Iterator[tuple[str, Type, Type, Node]]:
    """Attributes that are declared again, with both types. Of two properties, see above."""
    for name, symbol in info.names.items():
        own, mine = symbol.node, _attribute(symbol.node)
        if own is None or mine is None or (isinstance(own, Var) and own.is_inferred):
            continue
        for base in info.mro[1:]:
            theirs = base.names[name].node if name in base.names else None
            t = _attribute(theirs)
            if t is not None and (isinstance(own, Var) or isinstance(theirs, Var)):
                place = own.func if isinstance(own, Decorator) else own
                yield f"{name}, as in {base.name}", mine, t, place
                break


def _attribute(node: object) -> Type | None:
    """The type of a variable, or of a property."""
    if isinstance(node, Var):
        return node.type
    function = node.func if isinstance(node, Decorator) else node
    is_property = isinstance(function, FuncBase) and function.is_property
    signature = signature_of(node) if is_property else None
    return None if signature is None else signature.ret_type


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
