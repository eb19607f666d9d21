"""Placements of expressions compared with the types that are declared for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeGuard

from mypy.nodes import DictExpr, Expression, ListExpr, Node, StrExpr, TupleExpr
from mypy.subtypes import find_member
from mypy.typeops import callable_corresponding_argument
from mypy.types import (
    CallableType,
    Instance,
    ProperType,
    TupleType,
    Type,
    TypedDictType,
    UnionType,
    get_proper_type,
)

from spmd_moe.static.call_arguments import TypeOf, signatures
from spmd_moe.static.messages import Problem, declared_problem, named
from spmd_moe.static.placed_types import (
    DEPTH,
    SEQUENCES,
    each_kinds_of,
    is_a,
    items_of_both,
    kinds_of,
    place,
)
from spmd_moe.static.reassigned_names import is_constant
from spmd_moe.static.torch_names import is_foreign

Found: TypeAlias = Iterator[tuple[Problem, Node]]
Part: TypeAlias = tuple[Type, Type, str | None]


class Comparison:
    """How an expression and a type differ in placement; item by item where they have items."""

    def __init__(
        self, type_of: TypeOf, alternatives: Callable[[Expression], list[Expression]]
    ) -> None:
        self._type_of, self._alternatives = type_of, alternatives

    def expression(self, expr: Expression, need: Type | None, code: str, where: str) -> Found:
        if need is None:
            return
        either = self._alternatives(expr)
        needed = get_proper_type(need)
        if either:
            for one in either:
                yield from self.expression(one, need, code, where)
        elif isinstance(expr, TupleExpr | ListExpr) and _has_items(needed):
            each = needed.items if isinstance(needed, TupleType) else needed.args * len(expr.items)
            for item, t in zip(expr.items, each, strict=False):
                yield from self.expression(item, t, code, where)
        elif isinstance(expr, DictExpr):
            for key, value in expr.items:
                yield from self.expression(value, _value_at(key, needed), code, where)
        else:
            have = self._type_of(expr)
            kinds = kinds_of(have)
            if have is not None and kinds is not None and is_constant(expr):
                have = place(have, {r: k for r, k in kinds.items() if k not in ("R", "I")})
            found = self.types(have, need, code, where, named(expr))
            yield from ((problem, expr) for problem in found)

    def types(
        self, have: Type | None, need: Type | None, code: str, where: str, what: str, depth: int = 0
    ) -> Iterator[Problem]:
        if have is None or need is None or depth > DEPTH:
            return
        if kinds_of(have) is not None and kinds_of(need) is not None:
            yield from _differs(have, need, code, where, what)
            return
        for one, other, part in _parts(_without_none(have), _without_none(need)):
            within = where if part is None else f"{where}, {part} of {what}"
            yield from self.types(one, other, code, within, part or what, depth + 1)


def _differs(have: Type, need: Type, code: str, where: str, what: str) -> Iterator[Problem]:
    """Each placement that it may have must be one of those that it may have there."""
    wanted = each_kinds_of(need)
    for found in each_kinds_of(have):
        problems = [declared_problem(code, where, what, found, kinds) for kinds in wanted]
        told = [problem for problem in problems if problem is not None]
        if told and len(told) == len(wanted):
            yield told[0]
            return


def _parts(have: ProperType, need: ProperType) -> Iterator[Part]:
    """What corresponds in two types, the first to be taken for the second; what it is called."""
    yield from ((a, b, None) for a, b in items_of_both(have, need))
    if isinstance(need, CallableType):
        yield from _of_call(have, need)
    elif isinstance(need, Instance) and _is_own_protocol(need) and not is_a(have, need):
        yield from _of_protocol(have, need)


def _of_call(have: ProperType, need: CallableType) -> Iterator[Part]:
    """Results; and parameters, where what is needed is what will be given."""
    for overloads in signatures(have):
        if len(overloads) > 1:
            continue
        own = overloads[0].with_unpacked_kwargs()
        yield own.ret_type, need.ret_type, "result"
        pairs = [(w, callable_corresponding_argument(own, w)) for w in need.formal_arguments()]
        pairs += [(w, own.var_arg()) for w in [need.var_arg()] if w is not None]
        pairs += [(w, own.kw_arg()) for w in [need.kw_arg()] if w is not None]
        for wanted, mine in pairs:
            if mine is not None:
                yield wanted.typ, mine.typ, mine.name or wanted.name or "argument"


def _is_own_protocol(t: Instance) -> bool:
    return t.type.is_protocol and not is_foreign(t.type.fullname)


def _of_protocol(have: ProperType, need: Instance) -> Iterator[Part]:
    for name in need.type.protocol_members:
        wanted = find_member(name, need, need, is_operator=name == "__call__")
        if wanted is None:
            continue
        if name == "__call__":
            yield have, wanted, None
        elif isinstance(have, Instance):
            mine = find_member(name, have, have)
            if mine is not None:
                yield mine, wanted, name


def _has_items(t: Type) -> TypeGuard[TupleType | Instance]:
    return isinstance(t, TupleType) or (
        isinstance(t, Instance) and t.type.fullname in SEQUENCES and len(t.args) == 1
    )


def _value_at(key: Expression | None, mapping: ProperType) -> Type | None:
    """What a mapping is to have at a key; without a key, another mapping stands there (`**`)."""
    if key is None:
        return mapping
    if isinstance(mapping, TypedDictType):
        return mapping.items.get(key.value) if isinstance(key, StrExpr) else None
    return mapping.args[1] if isinstance(mapping, Instance) and len(mapping.args) == 2 else None


def _without_none(t: Type) -> ProperType:
    p = get_proper_type(t)
    if isinstance(p, UnionType):
        items = p.relevant_items()
        return get_proper_type(items[0]) if len(items) == 1 else p
    return p
