"""Calls of modules: `layer(x)` is checked as `layer.forward(x)`, where forward has placements."""

from __future__ import annotations

from typing import Any

from mypy.nodes import TypeInfo
from mypy.plugin import MethodSigContext
from mypy.typeops import bind_self
from mypy.types import CallableType, FunctionLike, Instance, Type, get_proper_type

from spmd_moe.static.error_codes import PLACEMENT
from spmd_moe.static.placed_types import placed_within, signature_of
from spmd_moe.static.problems_found import Notes

MODULE = "torch.nn.modules.module.Module"


def signature_of_call(ctx: MethodSigContext, notes: Notes) -> FunctionLike:
    """The hook for `__call__`: what mypy knows of a module's call is that it takes anything."""
    checker: Any = ctx.api
    if PLACEMENT in checker.options.disabled_error_codes:
        return ctx.default_signature
    receiver = get_proper_type(ctx.type)
    found = placed_forward(receiver) if isinstance(receiver, Instance) else None
    if found is None:
        return ctx.default_signature
    notes.review(checker.tree, checker)
    return found


def is_module(node: object) -> bool:
    return isinstance(node, TypeInfo) and any(base.fullname == MODULE for base in node.mro)


def placed_forward(module: Instance) -> CallableType | None:
    """The signature of a module's forward, bound to it; None if nothing in it is placed."""
    if not is_module(module.type):
        return None
    found = module.type.get("forward")
    signature = None if found is None else signature_of(found.node)
    if signature is None or not any(map(placed_within, _types(signature))):
        return None
    return bind_self(signature, module)


def _types(signature: CallableType) -> list[Type]:
    return [*signature.arg_types, signature.ret_type]
