"""mypy's daemon: it keeps modules in memory, and checks again what an edit may have changed.

It checks a module again either as a whole, if its file has changed, or function by function, if
something that they use has changed or they had errors. A review needs the types of a whole module:

- Each module begins with a function of ours, the ending, to which what a review reports belongs.
- A module with placements is marked as one of which nothing but the cache has been read. The daemon
  reads and checks such a file as a whole once anything has changed that a function in it uses; it
  looks at the mark for nothing else.
- So when the daemon does check single functions of such a module, because they had errors, nothing
  has changed for it, and the ending repeats what was said.
- A module whose first placement is found while functions of it are checked is marked then, and a
  change in its ending has the daemon come back to it.
- Definitions that the plugin reads are reported to mypy as dependencies, unless mypy counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mypy.checker import DeferredNode
from mypy.errors import ErrorInfo
from mypy.nodes import MISSING_FALLBACK, AssignmentStmt, FuncDef, MypyFile, NameExpr
from mypy.options import Options
from mypy.plugin import ClassDefContext
from mypy.server.trigger import make_trigger
from mypy.types import Instance

from spmd_moe.static.end_of_module import (
    LAST_PASS,
    NAME,
    is_ending_function,
    is_partial,
    new_ending,
    put_off,
)
from spmd_moe.static.error_report import Line
from spmd_moe.static.placed_types import forget_unused, restore_declared
from spmd_moe.static.refill_syntax_tree import read_again

_LAST_LINE = 1 << 30  # in this order the daemon checks functions of a module


class Daemon:
    """The modules that a daemon has read: which have placements, and what was said of them."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._known: set[str] = set()
        self._placed: set[str] = set()  # since it was last read
        self._reviewed: set[str] = set()  # the same
        self._said: dict[str, list[Line]] = {}
        self._waiting: dict[str, list[DeferredNode]] = {}

    def knows(self, module: str) -> bool:
        return module in self._known

    def begin(self, tree: MypyFile) -> None:
        """A file was read, and will be checked as a whole."""
        forget_unused()
        module = tree.fullname
        self._known.add(module)
        self._placed.discard(module)
        self._reviewed.discard(module)
        if any(map(is_ending_function, tree.defs[:1])):
            read_again(tree, self._options)
        ending = new_ending(Instance(MISSING_FALLBACK, []))
        ending.line = _LAST_LINE
        tree.defs.insert(0, ending)
        # A change in the ending, by `has_placements`, sends the daemon back to the module.
        tree.plugin_deps.setdefault(make_trigger(f"{module}.{NAME}"), set()).add(module)

    def has_placements(self, tree: MypyFile, checker: Any = None) -> None:
        """A hook was called in the module, by the checker or, without one, for an annotation."""
        module = tree.fullname
        ending = _ending(tree)
        if module not in self._placed:
            self._placed.add(module)
            if module in self._reviewed and ending is not None:
                tree.is_cache_skeleton = True
                ending.deprecated = None if ending.deprecated else "has placements now"
        if checker is not None and is_partial(checker) and ending is not None:
            put_off(ending, checker)

    def end(self, checker: Any, review: Callable[[], list[Line]]) -> None:
        """The ending is called: once in each pass over the whole, and after single functions."""
        module: str = checker.tree.fullname
        if is_partial(checker):
            restore_declared()
            if checker.pass_num == 1:  # it is checked for its own sake
                self._tell(checker)
        elif checker.pass_num == 0:
            self._put_off(checker)
        elif is_ending_function(self._waiting[module][-1].node):
            self._reviewed.add(module)
            self._said[module] = review() if module in self._placed else []
            self._tell(checker)
            checker.tree.is_cache_skeleton = module in self._placed
            restore_declared()
            if checker.pass_num <= LAST_PASS:  # the last that an edit gets is the first
                self._put_off(checker)
        else:  # others are waiting behind it, in a list that mypy is walking
            self._waiting[module].append(DeferredNode(_another(checker.tree), None))

    def _tell(self, checker: Any) -> None:
        """Say what there is to say, in place of what was said in the pass before."""
        module: str = checker.tree.fullname
        checker.errors.clear_errors_in_targets(checker.path, {f"{module}.{NAME}"})
        for line in self._said.get(module, []):
            line.tell(checker)
        if module in self._placed and checker.errors.error_info_map.get(checker.path):
            self._accompany(checker)

    def _accompany(self, checker: Any) -> None:
        """Have the ending checked with functions that are checked once more for their errors.

        An error in it is the daemon's reason to, also one that it does not show.
        """
        module: str = checker.tree.fullname
        target = f"{module}.{NAME}"
        nothing = ErrorInfo(
            import_ctx=[],
            local_ctx=(None, None),
            line=-1,
            column=0,
            end_line=-1,
            end_column=0,
            severity="note",
            message="",
            code=None,
            blocker=False,
            only_once=False,
            module=module,
            target=target,
        )
        nothing.hidden = True
        checker.errors.add_error_info(nothing, file=checker.path)

    def _put_off(self, checker: Any) -> None:
        put_off(_ending(checker.tree), checker)
        self._waiting[checker.tree.fullname] = checker.deferred_nodes


def _ending(tree: MypyFile) -> FuncDef | None:
    found = tree.names.get(NAME)
    return found.node if found is not None and isinstance(found.node, FuncDef) else None


def _another(tree: MypyFile) -> FuncDef:
    """The ending once more: of one function mypy sees only one in a pass."""
    ending = _ending(tree)
    assert ending is not None
    another = FuncDef(NAME, [], ending.body, None)
    another.type, another._fullname = ending.type, ending.fullname
    return another


def tell_dependencies(ctx: ClassDefContext) -> None:
    """What the plugin looks at when it meets a class, told to mypy.

    Calls of a module are checked as calls of its forward; and a record has a placement if one of
    its fields has.
    """
    api: Any = ctx.api
    name = ctx.cls.fullname
    api.add_plugin_dependency(make_trigger(f"{name}.forward"), make_trigger(f"{name}.__call__"))
    for statement in ctx.cls.defs.body if ctx.cls.decorators else ():
        for target in statement.lvalues if isinstance(statement, AssignmentStmt) else ():
            if isinstance(target, NameExpr):
                field = make_trigger(f"{name}.{target.name}")
                api.add_plugin_dependency(field, make_trigger(name))
