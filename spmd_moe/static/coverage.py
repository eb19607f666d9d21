"""Coverage of a module: functions with placements, and tensors of known placement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

from mypy.nodes import CallExpr, Expression, FuncDef, IndexExpr, MypyFile, Node, OpExpr
from mypy.types import CallableType, Type

from spmd_moe.static.placed_types import as_found, kinds_of, placed_within, tensor
from spmd_moe.static.strict_mode import MADE
from spmd_moe.static.syntax_tree import below, children


@final
@dataclass(frozen=True, slots=True)
class Coverage:
    """The counts of one module."""

    module: str
    functions: int = 0
    placed: int = 0  # functions whose signature names a placement
    unannotated: int = 0  # functions whose bodies mypy does not check
    known: int = 0  # expressions that are tensors, and have a placement
    unknown: int = 0


def coverage(tree: MypyFile, type_of: Callable[[Expression], Type | None]) -> Coverage:
    functions = [node for node in below(tree) if isinstance(node, FuncDef)]
    types = [t for t in map(type_of, _expressions(tree)) if tensor(t) is not None]
    known = sum(kinds_of(t) is not None for t in types)
    return Coverage(
        tree.fullname,
        len(functions),
        sum(map(_is_placed, functions)),
        sum(f.type is None for f in functions),
        known,
        len(types) - known,
    )


def found_in(types: dict[Expression, Type]) -> Callable[[Expression], Type | None]:
    """Returns a function that gives the type of an expression after mypy's run."""

    def type_of(expr: Expression) -> Type | None:
        t = types.get(expr)
        made = t is not None and isinstance(expr, CallExpr | OpExpr | IndexExpr)
        return as_found(t) if made and t is not None else t

    return type_of


def _expressions(node: Node) -> Iterable[Expression]:
    if isinstance(node, MADE):
        yield node
    for child in children(node):
        yield from _expressions(child)


def _is_placed(function: FuncDef) -> bool:
    t = function.type
    return isinstance(t, CallableType) and any(map(placed_within, [*t.arg_types, t.ret_type]))


def table(rows: list[Coverage]) -> str:
    """One line for each module, widest first column, and the sum below if there are several."""
    total = Coverage(
        "all", *(sum(getattr(row, name) for row in rows) for name in Coverage.__slots__[1:])
    )
    shown = rows + [total] * (len(rows) > 1)
    width = max(len("module"), *(len(row.module) for row in shown))
    lines = [f"{'module':<{width}}  functions placed   tensors known   unknown"]
    for row in shown:
        placed = f"{row.placed} of {row.functions}"
        known = f"{row.known} of {row.known + row.unknown}"
        lines.append(f"{row.module:<{width}}  {placed:>16}   {known:>13}   {row.unknown:>7}")
    return "\n".join(lines)
