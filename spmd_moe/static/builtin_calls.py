"""Built-in functions that pass on items: `enumerate`, `zip`, `list` and `tuple`.

torch does not say what the rows of a tensor are, and mypy forgets what is known of one object where
it infers a type variable.
"""

from __future__ import annotations

from mypy.plugin import FunctionContext
from mypy.types import Instance, TupleType, Type, get_proper_type

from spmd_moe.static.operator_rules import Operand, infer_operation
from spmd_moe.static.placed_types import is_any, kinds_of, place, tensor, tensors_in

ITEMS = frozenset(f"builtins.{name}" for name in ("enumerate", "zip", "list", "tuple"))
_OPTIONS = ("strict", "start")


def items_of(ctx: FunctionContext, fullname: str) -> Type:
    """The result, whose items are placed as those of the arguments are."""
    each = zip(ctx.callee_arg_names, ctx.arg_types, strict=True)
    given = [_item(t) for name, types in each if name not in _OPTIONS for t in types]
    p = get_proper_type(ctx.default_return_type)
    if not isinstance(p, Instance) or len(p.args) != 1 or not any(given):
        return ctx.default_return_type
    if fullname != "builtins.zip":
        return p.copy_modified(args=[_known(p.args[0], given[0])])
    items = get_proper_type(p.args[0])
    if not isinstance(items, TupleType) or len(items.items) != len(given):
        return ctx.default_return_type
    pairs = zip(items.items, given, strict=True)
    return p.copy_modified(args=[items.copy_modified(items=[_known(t, i) for t, i in pairs])])


def _known(t: Type, item: Type | None) -> Type:
    return item if item is not None and (is_any(t) or tensor(t) is not None) else t


def _item(t: Type) -> Type | None:
    """The type of an item: of a row, if it is a tensor; None where items are placed differently."""
    found = tensor(t)
    if found is not None:
        kinds = kinds_of(found)
        return place(found, infer_operation("Tensor.unbind", [Operand(0, kinds or {})])[0])
    each = list(tensors_in(t))
    same = each and all(kinds_of(item) == kinds_of(each[0]) for item in each)
    return place(each[0], kinds_of(each[0]) or {}) if same else None
