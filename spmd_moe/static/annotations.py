"""Annotations: `Placed[Tensor, DP[V], TP[S[0]]]` in a signature, an alias or a class, as kinds."""

from __future__ import annotations

from typing import Any

from mypy.nodes import SymbolTableNode, Var
from mypy.plugin import AnalyzeTypeContext
from mypy.server.trigger import make_trigger
from mypy.types import (
    AnyType,
    Instance,
    NoneType,
    RawExpressionType,
    Type,
    TypeOfAny,
    UnboundType,
    UnionType,
    get_proper_type,
)

from spmd_moe.static.error_codes import CODES
from spmd_moe.static.kinds import PRESENTATIONS, subscript
from spmd_moe.static.placed_types import declare, is_tensor_class, kinds_of, place
from spmd_moe.static.role_names import is_role, role_name

PLACED = "spmd_moe.core.placement.Placed"
KIND_NAMES = {f"spmd_types.types.{name}": name for name in "RIVP"}
SHARD_NAMES = ("spmd_moe.core.placement.S", "spmd_types.types.S", "spmd_types.types.Shard")
ROLE_LISTS = {
    f"spmd_moe.core.placement.{n}": p
    for n, p in zip(("DENSE", "EXPERT"), PRESENTATIONS, strict=True)
}
_FORM = "Placed[Tensor, DP[V], TP[S[0]]]"


class Annotation:
    """One `Placed[...]` while it is read. `roles` are the variables that were used as roles."""

    def __init__(self, ctx: AnalyzeTypeContext) -> None:
        self.ctx, self.roles = ctx, list[tuple[Var, UnboundType]]()

    def read(self) -> Type:
        arguments = self.ctx.type.args
        if not arguments:
            self._fail("Placed: it has no tensor and no kinds", self.ctx.type, _FORM)
            return AnyType(TypeOfAny.from_error)
        base, *written = arguments
        t = self.ctx.api.analyze_type(base)
        kinds = dict(kinds_of(t) or {})
        for argument in written:
            self._add(argument, kinds)
        if _is_no_tensor(t):
            self._fail(f"Placed: {t} is not a tensor", base, f"Placed[Tensor, {_tail(kinds)}]")
            return t
        return declare(place(t, kinds))

    def _add(self, argument: Type, kinds: dict[str, str]) -> None:
        """One `TP[S[0]]`."""
        if _is_quoted(argument):
            self._quoted(argument)
            return
        if not isinstance(argument, UnboundType) or len(argument.args) != 1:
            self._fail(f"Placed: {_source(argument)} is not a role with a kind", argument, _FORM)
            return
        role, kind = self._role(argument), self._kind(argument.args[0])
        if role is None or kind is None:
            return
        if role in kinds:
            self._fail(f"Placed: role {role} stands twice", argument, f"{role}[{kinds[role]}]")
            return
        kinds[role] = kind

    def _role(self, argument: UnboundType) -> str | None:
        found = self._look_up(argument)
        if found is None:
            return None  # mypy has said that there is no such name, or will look again
        if isinstance(found.node, Var) and is_role(found.node):
            self.roles.append((found.node, argument))
            return self._role_of(found.node, argument)
        self._fail(f"Placed: {argument.name} is not a role", argument, f'Role("{argument.name}")')
        return None

    def _role_of(self, variable: Var, argument: UnboundType) -> str | None:
        analyser: Any = self.ctx.api
        name = role_name(variable, analyser.api.modules)
        if name is None:
            what = f"Placed: which role {variable.name} is, its annotation hides"
            self._fail(what, argument, f"{variable.name} = ... without an annotation")
        return name

    def _kind(self, argument: Type) -> str | None:
        if _is_quoted(argument):
            self._quoted(argument)
            return None
        if isinstance(argument, UnboundType):
            found = self._look_up(argument)
            if found is None:
                return None
            name = found.fullname or ""
            if name in KIND_NAMES and not argument.args:
                return KIND_NAMES[name]
            if name in SHARD_NAMES:
                return self._shard(argument)
        self._fail(f"Placed: {_source(argument)} is not a kind", argument, "R, I, V, P or S[dim]")
        return None

    def _shard(self, argument: UnboundType) -> str | None:
        dim = argument.args[0] if len(argument.args) == 1 else None
        if isinstance(dim, RawExpressionType) and type(dim.literal_value) is int:
            return f"S({dim.literal_value})"
        self._fail("Placed: S needs the number of a dim", argument, "S[0]")
        return None

    def _quoted(self, argument: Type) -> None:
        """mypy reads what is quoted as if it were not; the interpreter sees a string."""
        self._fail(f"Placed: {_source(argument)} is a string", argument, "it without quotes")

    def _look_up(self, argument: UnboundType) -> SymbolTableNode | None:
        analyser: Any = self.ctx.api
        found: SymbolTableNode | None = analyser.lookup_qualified(argument.name, argument)
        self._depend(analyser, argument.name, found)
        return found if found is not None and found.node is not None else None

    def _depend(self, analyser: Any, name: str, found: SymbolTableNode | None) -> None:
        """Tell mypy's daemon of a role or kind: the type that is made of it does not name it."""
        used = [] if found is None else [found.fullname]
        owner, _, last = name.rpartition(".")
        module = analyser.lookup_qualified(owner, self.ctx.type, True) if owner else None
        if module is not None:
            used.append(f"{module.fullname}.{last}")
        for fullname in used:
            if fullname:
                analyser.api.add_plugin_dependency(make_trigger(fullname))

    def _fail(self, message: str, where: Type, fix: str) -> None:
        self.ctx.api.fail(f"{message} (write {fix})", where, code=CODES["annotation"])


def _is_quoted(t: Type) -> bool:
    return isinstance(t, UnboundType) and t.original_str_expr is not None


def _is_no_tensor(t: Type) -> bool:
    p = get_proper_type(t)
    if isinstance(p, UnionType):
        items = [i for i in p.items if not isinstance(get_proper_type(i), NoneType)]
        return not items or any(map(_is_no_tensor, items))
    if isinstance(p, Instance):
        return bool(p.type.mro) and not is_tensor_class(p.type)
    return isinstance(p, NoneType)


def _source(argument: Type) -> str:
    if isinstance(argument, UnboundType):
        if argument.original_str_expr is not None:
            return repr(argument.original_str_expr)
        inner = ", ".join(map(_source, argument.args))
        return f"{argument.name}[{inner}]" if inner else argument.name
    if isinstance(argument, RawExpressionType):
        return repr(argument.literal_value)
    return str(argument)


def _tail(kinds: dict[str, str]) -> str:
    return ", ".join(f"{role}[{subscript(kind)}]" for role, kind in kinds.items()) or "DP[V]"
