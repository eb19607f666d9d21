"""Table of hooks by name. Loaded when mypy first asks; a warm run may never ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from mypy.nodes import MypyFile, SymbolTableNode, TypeInfo
from mypy.nodes import TypeAlias as AliasNode
from mypy.plugin import (
    AnalyzeTypeContext,
    AttributeContext,
    ClassDefContext,
    FunctionContext,
    MethodContext,
    MethodSigContext,
)
from mypy.types import AnyType, CallableType, FunctionLike, Instance, Type, TypeOfAny

from spmd_moe.static import builtin_calls, torch_modules
from spmd_moe.static import expression_hooks as hooks
from spmd_moe.static import generic_placements as generics
from spmd_moe.static import module_calls as modules
from spmd_moe.static.annotations import PLACED, Annotation
from spmd_moe.static.collective_calls import COLLECTIVES, EXCHANGE
from spmd_moe.static.daemon import Daemon
from spmd_moe.static.end_of_module import HOOK, is_ending, is_over
from spmd_moe.static.placed_types import (
    declare,
    declare_all_of,
    is_tensor_class,
    kinds_of,
    placed_within,
)
from spmd_moe.static.problems_found import Notes, raises
from spmd_moe.static.reassigned_names import widen
from spmd_moe.static.review_module import review
from spmd_moe.static.role_names import ROLE
from spmd_moe.static.settings import Config
from spmd_moe.static.torch_names import function_operation, is_foreign, method_operation

C = TypeVar("C")
LookUp: TypeAlias = Callable[[str], SymbolTableNode | None]
OfAnnotation: TypeAlias = Callable[[AnalyzeTypeContext], Type]
OfFunction: TypeAlias = Callable[[FunctionContext], Type]
OfMethod: TypeAlias = Callable[[MethodContext], Type]
OfAttribute: TypeAlias = Callable[[AttributeContext], Type]
OfClass: TypeAlias = Callable[[ClassDefContext], None]
OfSignature: TypeAlias = Callable[[MethodSigContext], FunctionLike]

_UNTYPED_DECORATOR = "spmd_types._traceback.api_boundary"
_SHARDS = (
    "spmd_moe.core.placement._ShardKind.__call__",
    "spmd_moe.core.placement._ShardKind.__getitem__",
)


class Answers:
    """Hooks by name; a name without one is none of ours."""

    def __init__(self, look_up: LookUp, config: Config, daemon: Daemon | None) -> None:
        self._look_up, self._config, self._daemon = look_up, config, daemon
        self.notes = Notes(self._function_type, daemon)
        self._aliases: dict[str, tuple[Type, bool]] = {}
        self._placed_names: dict[str, bool] = {}
        self._tensor_classes: dict[str, bool] = {}
        self._read_already = ""  # the alias that is being read, by mypy itself this time

    # --- annotations --------------------------------------------------------------------------

    def annotation(self, fullname: str) -> tuple[OfAnnotation | None, bool]:
        """The hook, and whether that is the answer whenever mypy asks again."""
        if fullname == PLACED:
            return _careful(self._placed, lambda ctx: AnyType(TypeOfAny.from_error)), True
        found = None if is_foreign(fullname) else self._look_up(fullname)
        alias = None if found is None else found.node
        if not isinstance(alias, AliasNode):
            return None, self.lasts(fullname) and (
                is_foreign(fullname) or isinstance(alias, TypeInfo)
            )
        if self._read_already == fullname or not self._is_placed_alias(alias):
            return None, False
        return lambda ctx: self._alias(ctx, fullname), False

    def _is_placed_alias(self, alias: AliasNode) -> bool:
        known = self._aliases.get(alias.fullname)
        # mypy reads an alias more than once; in a daemon, what it is made of may change too.
        if known is None or known[0] is not alias.target or self._daemon is not None:
            known = alias.target, placed_within(alias.target)
            self._aliases[alias.fullname] = known
        if known[1]:
            declare(alias.target)
        return known[1]

    def _placed(self, ctx: AnalyzeTypeContext) -> Type:
        annotation = Annotation(ctx)
        t = annotation.read()
        analyser: Any = ctx.api
        self.notes.use_roles(analyser.api.cur_mod_node, annotation.roles)
        return t

    def _alias(self, ctx: AnalyzeTypeContext, fullname: str) -> Type:
        """An alias of a placed type: mypy reads it, but the module that has it has placements."""
        analyser: Any = ctx.api
        self.notes.review(analyser.api.cur_mod_node)
        self._read_already = fullname
        try:
            return ctx.api.analyze_type(ctx.type)
        finally:
            self._read_already = ""

    # --- calls and attributes -----------------------------------------------------------------

    def function(self, fullname: str) -> OfFunction | None:
        notes = self.notes
        if fullname == _UNTYPED_DECORATOR:
            return _careful(lambda ctx: ctx.arg_types[0][0], _default)
        if fullname in builtin_calls.ITEMS:
            return _careful(lambda ctx: builtin_calls.items_of(ctx, fullname), _default)
        if fullname == EXCHANGE:
            return _careful(lambda ctx: hooks.exchange(ctx, notes), _default)
        if fullname in COLLECTIVES:
            return _careful(lambda ctx: hooks.collective(ctx, fullname, notes), _default)
        if fullname == ROLE:
            return _careful(lambda ctx: hooks.role(ctx, notes), _default)
        if fullname == "spmd_types.types.Shard":
            return _careful(lambda ctx: hooks.shard_kind(ctx, notes), _default)
        name = function_operation(fullname)
        if name is not None:
            return _careful(lambda ctx: hooks.operation(ctx, name, notes), _default)
        placed = self._is_placed(fullname)
        form = self._generic(fullname)
        if form is not None:
            return _careful(lambda ctx: generics.result(ctx, form), _default)
        return _careful(self._of_placed, _default) if placed else None

    def _generic(self, fullname: str) -> CallableType | None:
        """The signature of a function that returns what is placed as what it was given."""
        found = None if is_foreign(fullname) else self._look_up(fullname)
        return None if found is None else generics.template(found.node)

    def method(self, fullname: str) -> OfMethod | None:
        notes = self.notes
        placed = self._is_placed(fullname)
        if fullname == HOOK:
            return _careful(self._end_of_module, _default)
        if fullname == "spmd_moe.core.mesh.MoEMesh.__getitem__":
            return _careful(lambda ctx: hooks.axis_of_mesh(ctx, notes), _default)
        if fullname in _SHARDS:
            return _careful(lambda ctx: hooks.shard_kind(ctx, notes), _default)
        if fullname.endswith(".__call__") and torch_modules.is_own(fullname):
            return _careful(
                lambda ctx: torch_modules.result_of_call(ctx, fullname, notes), _default
            )
        name = method_operation(fullname, self._is_tensor)
        if name is None:
            return _careful(self._of_placed, _default) if placed else None
        return _careful(lambda ctx: hooks.operation(ctx, name, notes), _default)

    def signature(self, fullname: str) -> OfSignature | None:
        if is_foreign(fullname) or not self._is_module(fullname.removesuffix(".__call__")):
            return None
        return _careful(
            lambda ctx: modules.signature_of_call(ctx, self.notes),
            lambda ctx: ctx.default_signature,
        )

    def _is_module(self, fullname: str) -> bool:
        if "@" in fullname:
            return True  # a class in a function, which is not found by its name, may be one
        found = self._look_up(fullname)
        return found is not None and modules.is_module(found.node)

    def attribute(self, fullname: str) -> OfAttribute | None:
        notes = self.notes
        self._is_placed(fullname)
        if fullname == "spmd_moe.core.mesh.Axis.group":
            return _careful(lambda ctx: hooks.group_of_axis(ctx, notes), _default_attribute)
        owner, _, short = fullname.rpartition(".")
        if owner.startswith("torch.return_types"):
            return _careful(lambda ctx: hooks.attribute(ctx, fullname, notes), _default_attribute)
        if short in hooks.ATTRIBUTES:
            name = method_operation(fullname, self._is_tensor)
            if name is not None:
                return _careful(lambda ctx: hooks.attribute(ctx, name, notes), _default_attribute)
        return None

    def _of_placed(self, ctx: FunctionContext | MethodContext) -> Type:
        """What is called is declared with a placement, so that there is something to compare."""
        checker: Any = ctx.api
        self.notes.review(checker.tree, checker)
        kinds = kinds_of(ctx.default_return_type)
        if kinds is not None:
            widen(checker, self.notes.assignments(checker).target_of(ctx.context), kinds)
        return ctx.default_return_type

    def _is_placed(self, fullname: str) -> bool:
        """Whether there is a placement in what a name is declared to be; from now on it stays."""
        if is_foreign(fullname):
            return False
        if fullname not in self._placed_names or self._daemon is not None:
            owner, _, name = fullname.rpartition(".")
            found = self._look_up(owner)
            if found is not None and isinstance(found.node, TypeInfo):
                found = found.node.get(name)
            else:
                found = self._look_up(fullname)
            node = None if found is None else found.node
            self._placed_names[fullname] = declare_all_of(node)
        return self._placed_names[fullname]

    def _is_tensor(self, fullname: str) -> bool:
        if fullname not in self._tensor_classes or not self.lasts(fullname):
            found = self._look_up(fullname)
            node = None if found is None else found.node
            self._tensor_classes[fullname] = isinstance(node, TypeInfo) and is_tensor_class(node)
        return self._tensor_classes[fullname]

    # --- the end of a module ------------------------------------------------------------------

    def _end_of_module(self, ctx: MethodContext) -> Type:
        checker: Any = ctx.api
        if not is_ending(ctx.context):
            return ctx.default_return_type
        module: str = checker.tree.fullname
        if self._daemon is not None and self._daemon.knows(module):
            self._daemon.end(checker, lambda: review(checker, self.notes, self._config))
        elif is_over(checker):
            for line in review(checker, self.notes, self._config):
                line.tell(checker)
            self.notes.finish(module)
        return ctx.default_return_type

    def begin_module(self, tree: MypyFile) -> None:
        """A daemon has read a file."""
        if self._daemon is not None:
            self.notes.forget(tree.fullname)
            self._daemon.begin(tree)

    def lasts(self, fullname: str) -> bool:
        """Whether what a name stands for never changes."""
        return self._daemon is None or is_foreign(fullname)

    def _function_type(self) -> Instance:
        found = self._look_up("builtins.function")
        assert found is not None and isinstance(found.node, TypeInfo)
        return Instance(found.node, [])


def _default(ctx: FunctionContext | MethodContext) -> Type:
    return ctx.default_return_type


def _default_attribute(ctx: AttributeContext) -> Type:
    return ctx.default_attr_type


def _careful(hook: Callable[[C], Any], otherwise: Callable[[C], Any]) -> Callable[[C], Any]:
    """An error of the plugin's own never ends mypy: then nothing is known. Tests do raise it."""

    def run(ctx: C) -> Any:
        if raises():
            return hook(ctx)
        try:
            return hook(ctx)
        except Exception:
            return otherwise(ctx)

    return run
