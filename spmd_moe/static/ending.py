"""Being called once more for a module, after mypy has checked all of it.

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

_NAME, _WORD = "end of module (spmd_moe)", "spmd_moe: the module is checked"
HOOK = "builtins.str.casefold"  # nobody calls it on a literal
_LAST_PASS = 2  # after it mypy puts nothing off any more


def request_review(tree: MypyFile, function: Instance, checker: Any = None) -> None:
    """Have the hook called when all of the module is checked. Asking twice does nothing."""
    known = tree.names.get(_NAME)
    if known is None:
        ending = _ending(tree, function)
        known = SymbolTableNode(GDEF, ending, module_public=False, no_serialize=True)
        tree.names[_NAME] = known
    if checker is not None:
        _put_off(known.node, checker)


def _put_off(ending: Any, checker: Any) -> None:
    if not any(deferred.node is ending for deferred in checker.deferred_nodes):
        checker.deferred_nodes.append(DeferredNode(ending, None))


def is_ending(context: object) -> bool:
    """Whether a call is the one that was put there."""
    callee = context.callee if isinstance(context, CallExpr) else None
    text = callee.expr if isinstance(callee, MemberExpr) else None
    return isinstance(text, StrExpr) and text.value == _WORD


def is_over(checker: Any) -> bool:
    """Whether mypy has finished with the module; if not, the ending is put off."""
    if checker.pass_num > _LAST_PASS:
        checker.tree.names.pop(_NAME, None)
        return True
    _put_off(checker.tree.names[_NAME].node, checker)
    return False


def _ending(tree: MypyFile, function: Instance) -> FuncDef:
    call = CallExpr(MemberExpr(StrExpr(_WORD), "casefold"), [], [], [])
    signature = CallableType([], [], [], NoneType(), function)
    ending = FuncDef(_NAME, [], Block([ExpressionStmt(call)]), signature)
    ending._fullname = f"{tree.fullname}.{_NAME}"
    return ending
