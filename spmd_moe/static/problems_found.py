"""Problems and roles found while mypy checks, kept until a module is reviewed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

from mypy.nodes import Context, MypyFile, Var
from mypy.plugin import AttributeContext, FunctionContext, MethodContext
from mypy.types import Instance, UnboundType

from spmd_moe.static.daemon import Daemon
from spmd_moe.static.end_of_module import is_partial, request_review
from spmd_moe.static.messages import Problem
from spmd_moe.static.reassigned_names import Assignments

CheckContext: TypeAlias = FunctionContext | MethodContext | AttributeContext

# In tests an error of the plugin's own must not pass for a tensor of which nothing is known.
RAISE = "SPMD_MOE_PLUGIN_RAISE"


def raises() -> bool:
    return bool(os.environ.get(RAISE))


class Notes:
    """Problems and roles by module; and whether a module has placements at all."""

    def __init__(self, function: Callable[[], Instance], daemon: Daemon | None) -> None:
        self._function = function  # mypy's type of functions, once there is one
        self._daemon = daemon
        self._assigns: tuple[Any, Assignments] | None = None
        self._over: set[str] = set()
        self._problems: dict[str, dict[int, tuple[Context, Problem]]] = {}
        self._roles: dict[str, list[tuple[Var, UnboundType]]] = {}

    def record(self, ctx: CheckContext, problem: Problem | None, *, keep: bool = False) -> None:
        """The problem of an expression, as of the last time that it was checked.

        With `keep`, a problem stays: the body of a loop is checked with what it came with first.
        """
        checker: Any = ctx.api
        module = checker.tree.fullname
        self.review(checker.tree, checker)
        if is_partial(checker):
            return
        found = self._problems.setdefault(module, {})
        if not keep:
            found.pop(id(ctx.context), None)
        if problem is not None:
            found[id(ctx.context)] = ctx.context, problem

    def assignments(self, checker: Any) -> Assignments:
        """What the function that is being checked assigns; read once for each function."""
        function = checker.scope.current_function()
        if self._assigns is None or self._assigns[0] is not function:
            self._assigns = function, Assignments(function)
        return self._assigns[1]

    def review(self, tree: MypyFile, checker: Any = None) -> None:
        if self._daemon is not None and self._daemon.knows(tree.fullname):
            self._daemon.has_placements(tree, checker)
        elif tree.fullname not in self._over:
            request_review(tree, self._function(), checker)

    def use_roles(self, tree: MypyFile, roles: list[tuple[Var, UnboundType]]) -> None:
        self.review(tree)
        self._roles.setdefault(tree.fullname, []).extend(roles)

    def problems(self, module: str) -> list[tuple[Context, Problem]]:
        return list(self._problems.get(module, {}).values())

    def roles(self, module: str) -> list[tuple[Var, UnboundType]]:
        return self._roles.get(module, [])

    def forget(self, module: str) -> None:
        self._problems.pop(module, None)
        self._roles.pop(module, None)

    def finish(self, module: str) -> None:
        """The module is reviewed, for good."""
        self._over.add(module)
        self.forget(module)
