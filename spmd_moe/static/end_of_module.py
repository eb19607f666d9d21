"""A hook at the end of a module, after mypy has checked all of it.

mypy has no hook for that. It does check every function that stands in a module's symbol table, so a
function of ours is put there; its one call has a name that the plugin answers to. It puts itself
off until mypy has finished with functions that had to wait for others' types.
"""

from __future__ import annotations

from typing import Any

from mypy.checker import DeferredNode
from mypy.nodes import (
    GDEF,
    Block,
    CallExpr,
    ExpressionStmt,
    FuncDef,
    MemberExpr,
    MypyFile,
    StrExpr,
    SymbolTableNode,
)
from mypy.types import CallableType, Instance, NoneType

# Without a line of its own that could be reported; `from module import *` leaves it where it is.
NAME, _WORD = "_end of module (spmd_moe)", "spmd_moe: the module is checked"
HOOK = "builtins.str.casefold"  # no program calls it on a literal
LAST_PASS = 2  # after it mypy puts nothing off any more


def request_review(tree: MypyFile, function: Instance, checker: Any = None) -> None:
    """Have the hook called when all of the module is checked. Asking twice does nothing."""
    known = tree.names.get(NAME)
    if known is None:
        ending = new_ending(function)
        ending._fullname = f"{tree.fullname}.{NAME}"
        known = SymbolTableNode(GDEF, ending, module_public=False, no_serialize=True)
        tree.names[NAME] = known
    if checker is not None:
        put_off(known.node, checker)


def put_off(ending: Any, checker: Any) -> None:
    if not any(deferred.node is ending for deferred in checker.deferred_nodes):
        checker.deferred_nodes.append(DeferredNode(ending, None))


def is_ending(context: object) -> bool:
    """Whether a call is the one that was put there."""
    callee = context.callee if isinstance(context, CallExpr) else None
    text = callee.expr if isinstance(callee, MemberExpr) else None
    return isinstance(text, StrExpr) and text.value == _WORD


def is_ending_function(node: object) -> bool:
    return isinstance(node, FuncDef) and node.name == NAME


def is_partial(checker: Any) -> bool:
    """Whether this is a daemon that checks single functions once more."""
    return bool(checker.last_pass > LAST_PASS)


def is_over(checker: Any) -> bool:
    """Whether mypy has finished with the module; if not, the ending is put off."""
    if checker.pass_num > LAST_PASS:
        checker.tree.names.pop(NAME, None)
        return True
    put_off(checker.tree.names[NAME].node, checker)
    return False


def new_ending(function: Instance) -> FuncDef:
    call = CallExpr(MemberExpr(StrExpr(_WORD), "casefold"), [], [], [])
    signature = CallableType([], [], [], NoneType(), function)
    return FuncDef(NAME, [], Block([ExpressionStmt(call)]), signature)
