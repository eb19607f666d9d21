"""The plugin as mypy sees it: which hook answers for which name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from mypy.nodes import FuncDef, TypeAlias, TypeInfo
from mypy.options import Options
from mypy.plugin import (
    AnalyzeTypeContext,
    AttributeContext,
    FunctionContext,
    MethodContext,
    MethodSigContext,
    Plugin,
    ReportConfigContext,
)
from mypy.types import AnyType, FunctionLike, Instance, Type, TypeOfAny

from spmd_moe.static import hooks, modules
from spmd_moe.static.annotations import PLACED, Annotation
from spmd_moe.static.config import read_config
from spmd_moe.static.ending import HOOK, is_ending, is_over
from spmd_moe.static.moves import COLLECTIVES, EXCHANGE
from spmd_moe.static.names import function_operation, is_foreign, method_operation
from spmd_moe.static.notes import Notes, raises
from spmd_moe.static.review import review
from spmd_moe.static.roles import ROLE
from spmd_moe.static.types import (
    declare,
    declare_all_of,
    generic_parameter,
    is_tensor_class,
    placed_within,
)

C = TypeVar("C")

_UNTYPED_DECORATOR = "spmd_types._traceback.api_boundary"
_SHARDS = ("spmd_moe.placement._ShardKind.__call__", "spmd_moe.placement._ShardKind.__getitem__")


class SpmdMoePlugin(Plugin):
    """Placements in mypy. It holds no state of its own beyond what a run writes down."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        # So that mypy reads the definition of `Placed` that is meant for this plugin.
        options.always_true = [*options.always_true, "_WITH_PLUGIN"]
        self._config = read_config(options.config_file)
        self._notes = Notes(self._function_type)
        self._tensor_classes: dict[str, bool] = {}
        self._generic: dict[str, int | None] = {}
        self._seen: set[str] = set()
        self._scanned = 0
        self._of_users: list[Any] = []

    # --- annotations --------------------------------------------------------------------------

    def get_type_analyze_hook(self, fullname: str) -> Callable[[AnalyzeTypeContext], Type] | None:
        if fullname == PLACED:
            return _careful(self._placed, lambda ctx: AnyType(TypeOfAny.from_error))
        if not is_foreign(fullname) and self._is_placed_alias(fullname):
            self._review_users_modules()
        return None

    def _placed(self, ctx: AnalyzeTypeContext) -> Type:
        annotation = Annotation(ctx)
        t = annotation.read()
        analyser: Any = ctx.api
        self._notes.use_roles(analyser.api.cur_mod_node, annotation.roles)
        return t

    def _is_placed_alias(self, fullname: str) -> bool:
        found = self.lookup_fully_qualified(fullname)
        alias = None if found is None else found.node
        if not isinstance(alias, TypeAlias) or not placed_within(alias.target):
            return False
        declare(alias.target)
        return True

    def _review_users_modules(self) -> None:
        """A module that names an alias of a placed type has placements, and no hook knows which."""
        trees = self._modules or {}
        if len(trees) != self._scanned:
            self._scanned = len(trees)
            self._of_users = [t for name, t in trees.items() if not is_foreign(name + ".")]
        for tree in self._of_users:
            if tree.defs:
                self._notes.review(tree)

    # --- calls --------------------------------------------------------------------------------

    def get_function_hook(self, fullname: str) -> Callable[[FunctionContext], Type] | None:
        notes = self._notes
        self._declare(fullname)
        if fullname == _UNTYPED_DECORATOR:
            return _careful(lambda ctx: ctx.arg_types[0][0], _default)
        if fullname == EXCHANGE:
            return _careful(lambda ctx: hooks.exchange(ctx, notes), _default)
        if fullname in COLLECTIVES:
            return _careful(lambda ctx: hooks.collective(ctx, fullname, notes), _default)
        if fullname == ROLE:
            return _careful(lambda ctx: hooks.role(ctx, notes), _default)
        if fullname == "spmd_types.types.Shard":
            return _careful(lambda ctx: hooks.shard_kind(ctx, notes), _default)
        name = function_operation(fullname)
        if name is None:
            position = self._generic_in(fullname)
            if position is None:
                return None
            return _careful(lambda ctx: hooks.generic(ctx, position, notes), _default)
        return _careful(lambda ctx: hooks.operation(ctx, name, notes), _default)

    def _declare(self, fullname: str) -> None:
        """Keep the placements in what a name is declared to be, the first time that it is used."""
        if fullname not in self._seen and not is_foreign(fullname):
            self._seen.add(fullname)
            owner, _, name = fullname.rpartition(".")
            found = self.lookup_fully_qualified(owner)
            if found is not None and isinstance(found.node, TypeInfo):
                found = found.node.get(name)
            else:
                found = self.lookup_fully_qualified(fullname)
            declare_all_of(None if found is None else found.node)

    def _generic_in(self, fullname: str) -> int | None:
        """The parameter whose type a function returns, if it is generic in a tensor."""
        if fullname not in self._generic:
            found = None if is_foreign(fullname) else self.lookup_fully_qualified(fullname)
            node = None if found is None else found.node
            self._generic[fullname] = generic_parameter(node) if isinstance(node, FuncDef) else None
        return self._generic[fullname]

    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        notes = self._notes
        self._declare(fullname)
        if fullname == HOOK:
            return _careful(self._end_of_module, _default)
        if fullname == "spmd_moe.mesh.MoEMesh.__getitem__":
            return _careful(lambda ctx: hooks.axis_of_mesh(ctx, notes), _default)
        if fullname in _SHARDS:
            return _careful(lambda ctx: hooks.shard_kind(ctx, notes), _default)
        name = method_operation(fullname, self._is_tensor)
        if name is None:
            return None
        return _careful(lambda ctx: hooks.operation(ctx, name, notes), _default)

    def get_method_signature_hook(
        self, fullname: str
    ) -> Callable[[MethodSigContext], FunctionLike] | None:
        if not fullname.endswith(".__call__") or is_foreign(fullname):
            return None
        return _careful(modules.signature_of_call, lambda ctx: ctx.default_signature)

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        notes = self._notes
        self._declare(fullname)
        if fullname == "spmd_moe.mesh.Axis.group":
            return _careful(lambda ctx: hooks.group_of_axis(ctx, notes), _default_attribute)
        owner, _, short = fullname.rpartition(".")
        if owner.startswith("torch.return_types"):
            return _careful(lambda ctx: hooks.attribute(ctx, fullname, notes), _default_attribute)
        name = method_operation(fullname, self._is_tensor)
        if name is None or short not in hooks.ATTRIBUTES:
            return None
        return _careful(lambda ctx: hooks.attribute(ctx, name, notes), _default_attribute)

    def _is_tensor(self, fullname: str) -> bool:
        if fullname not in self._tensor_classes:
            found = self.lookup_fully_qualified(fullname)
            node = None if found is None else found.node
            if not isinstance(node, TypeInfo) or not node.mro:
                return False
            self._tensor_classes[fullname] = is_tensor_class(node)
        return self._tensor_classes[fullname]

    # --- the end of a module, and of a run ----------------------------------------------------

    def _end_of_module(self, ctx: MethodContext) -> Type:
        checker: Any = ctx.api
        if is_ending(ctx.context) and is_over(checker):
            self._notes.over.add(checker.tree.fullname)
            review(checker, self._notes, self._config)
        return ctx.default_return_type

    def report_config_data(self, ctx: ReportConfigContext) -> Any:
        """What a cached result depends on: a digest of the rules, for modules they can touch."""
        if is_foreign(ctx.id + "."):
            return None
        return [rules_digest(), self._config.is_strict(ctx.id)]

    def _function_type(self) -> Instance:
        found = self.lookup_fully_qualified("builtins.function")
        assert found is not None and isinstance(found.node, TypeInfo)
        return Instance(found.node, [])


@cache
def rules_digest() -> str:
    """A hash of every file of the static check."""
    files = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


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
