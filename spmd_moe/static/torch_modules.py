"""Calls of torch's own modules: `self.norm(x)`, where `self.norm` is an `nn.RMSNorm`.

Their forward has no placements. What comes out follows from what goes in, and from their parameters
where `declare_placements` in the same class declares them; where it does not, V, I and P stay what
they are, since no parameter could change that without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from mypy.nodes import (
    AssignmentStmt,
    CallExpr,
    DictExpr,
    Expression,
    ForStmt,
    FuncDef,
    GeneratorExpr,
    IndexExpr,
    IntExpr,
    ListComprehension,
    ListExpr,
    MemberExpr,
    NameExpr,
    Node,
    RefExpr,
    StarExpr,
    StrExpr,
    TupleExpr,
    TypeAlias,
    TypeInfo,
)
from mypy.plugin import MethodContext
from mypy.types import TupleType, Type

from spmd_moe.static.annotations import KIND_NAMES, PLACED, SHARD_NAMES
from spmd_moe.static.expression_hooks import role_named
from spmd_moe.static.kinds import Kinds
from spmd_moe.static.messages import Named, Problem, named, operation_problem
from spmd_moe.static.module_calls import MODULE
from spmd_moe.static.operator_rules import Operand, infer
from spmd_moe.static.placed_types import kinds_of, place, signature_of, tensor
from spmd_moe.static.problems_found import Notes
from spmd_moe.static.syntax_tree import below

OWN = "torch.nn.modules."
_DECLARE = "spmd_moe.core.declare_placements.declare_placements"
_LINEAR = frozenset({"Identity", "Flatten", "Unflatten"})
_NO_PARAMETERS = _LINEAR | {
    *("Dropout", "AlphaDropout", "Softmax", "LogSoftmax", "Softplus", "ReLU", "ReLU6", "GELU"),
    *("SiLU", "Mish", "Sigmoid", "Tanh", "LeakyReLU", "ELU", "SELU", "Hardtanh", "Hardswish"),
    *("GLU", "Softsign", "LogSigmoid"),
}
_WITH_PARAMETERS = frozenset({"Linear", "Bilinear", "Embedding", "EmbeddingBag", "PReLU"}) | {
    *("LayerNorm", "RMSNorm", "GroupNorm", "Conv1d", "Conv2d", "MultiheadAttention"),
}
_CLASSES = _NO_PARAMETERS | _WITH_PARAMETERS | {"Sequential"}  # what may be hooked
_UNKNOWN = "a class that cannot be told"


def is_own(fullname: str) -> bool:
    """Whether the hook of a module's `__call__` is for one of torch's classes, or for any."""
    owner = fullname.removesuffix(".__call__")
    return owner == MODULE or (owner.startswith(OWN) and owner.rpartition(".")[2] in _CLASSES)


def result_of_call(ctx: MethodContext, fullname: str, notes: Notes) -> Type:
    """What a module of torch's returns."""
    checker: Any = ctx.api
    given = [t for types in ctx.arg_types for t in types]
    operands = [k for k in map(kinds_of, given) if k is not None]
    call = ctx.context
    if not operands or not isinstance(call, CallExpr):
        return ctx.default_return_type
    classes = _classes_of(call.callee, fullname.removesuffix(".__call__"), checker)
    if any(isinstance(each, TypeInfo) for each in classes):
        return _of_forward(classes) or ctx.default_return_type
    names = {name for name in classes if isinstance(name, str)}
    if not names or not names <= _NO_PARAMETERS | _WITH_PARAMETERS:
        return ctx.default_return_type
    declared = _parameters(call.callee, checker) if names & _WITH_PARAMETERS else []
    linearity = "linear" if names <= _LINEAR else "nonlinear"
    result, refusal = infer([*operands, *declared], linearity)
    problem: Problem | None = None
    if refusal is not None:
        texts = [Named(Operand(i, k), named(a)) for i, (k, a) in enumerate(_pairs(call, checker))]
        problem = operation_problem(named(call.callee), texts, refusal)
    notes.record(ctx, problem)
    found = next(t for t in map(tensor, given) if t is not None)
    placed = place(found, result)
    if "MultiheadAttention" in names:
        return TupleType([placed, placed], ctx.api.named_generic_type("builtins.tuple", [placed]))
    return placed


def _pairs(call: CallExpr, checker: Any) -> Iterator[tuple[Kinds, Expression]]:
    for argument in call.args:
        kinds = kinds_of(checker.lookup_type_or_none(argument))
        if kinds is not None:
            yield kinds, argument


def _of_forward(classes: list[str | TypeInfo]) -> Type | None:
    """Of the user's own classes, what their forward is declared to return, if it is one type."""
    results: list[Type] = []
    for each in classes:
        found = each.get("forward") if isinstance(each, TypeInfo) else None
        signature = None if found is None else signature_of(found.node)
        if signature is None or kinds_of(signature.ret_type) is None:
            return None
        results.append(signature.ret_type)
    same = results and all(kinds_of(t) == kinds_of(results[0]) for t in results)
    return results[0] if same else None


# --- which classes are called -----------------------------------------------------------------


def _classes_of(callee: Expression, owner: str, checker: Any) -> list[str | TypeInfo]:
    """Names of torch's classes, or classes of the user's; none where it cannot be said."""
    name = owner.rpartition(".")[2]
    if name == "Sequential":
        return _made_by(callee, checker)
    if owner != MODULE:
        return [name]
    listed = callee.base if isinstance(callee, IndexExpr) else _run_over(callee, checker)
    return [] if listed is None else _made_by(listed, checker)


def _run_over(callee: Expression, checker: Any) -> Expression | None:
    """`self.layers` in `for layer in self.layers: layer(x)`, or in `enumerate(self.layers)`."""
    function = checker.scope.current_function()
    if not isinstance(callee, NameExpr) or not isinstance(function, FuncDef):
        return None
    for node in below(function.body):
        if isinstance(node, ForStmt):
            over = node.expr
            index = [node.index]
            if isinstance(over, CallExpr) and over.args:
                over = over.args[0]
                index = list(node.index.items[1:]) if isinstance(node.index, TupleExpr) else []
            if any(isinstance(i, NameExpr) and i.node is callee.node for i in index):
                return over
    return None


def _made_by(attribute: Expression, checker: Any) -> list[str | TypeInfo]:
    """The classes in `self.layers = nn.ModuleList([Linear(...), ...])`, and in a Sequential."""
    value = _assigned(attribute, checker)
    if value is None:
        return []
    found: list[str | TypeInfo] = []
    for item in _items(value):
        made = _class_made(item)
        if made is None:
            return []
        if made.fullname.startswith(OWN):
            found += _classes_in(item, made)
        else:
            found.append(made)
    return found


def _classes_in(call: Expression, made: TypeInfo) -> list[str | TypeInfo]:
    """A class of torch's own by its name; of a Sequential, those in it."""
    if made.name != "Sequential" or not isinstance(call, CallExpr):
        return [made.name]
    found: list[str | TypeInfo] = []
    for inner in map(_class_made, _items(call)):
        own = inner is not None and inner.fullname.startswith(OWN)
        found.append(_UNKNOWN if inner is None else inner.name if own else inner)
    return found


def _is_ref(expr: Expression, fullname: str) -> bool:
    return isinstance(expr, RefExpr) and expr.fullname == fullname


def _class_made(expr: Expression) -> TypeInfo | None:
    callee = expr.callee if isinstance(expr, CallExpr) else None
    made = callee.node if isinstance(callee, RefExpr) else None
    return made if isinstance(made, TypeInfo) else None


def _items(call: CallExpr) -> Iterator[Expression]:
    for argument in call.args:
        inner = argument.expr if isinstance(argument, StarExpr) else argument
        if isinstance(inner, ListComprehension):
            inner = inner.generator
        if isinstance(inner, GeneratorExpr):
            yield inner.left_expr
        elif isinstance(inner, ListExpr | TupleExpr):
            yield from inner.items
        else:
            yield inner


def _assigned(attribute: Expression, checker: Any) -> CallExpr | None:
    """What `__init__` of the class that is being checked assigns to `self.layers`."""
    name = _own_name(attribute)
    for node in _in_constructor(checker) if name else ():
        if isinstance(node, AssignmentStmt):
            for target, value in _pairs_assigned(node):
                if _own_name(target) == name and isinstance(value, CallExpr):
                    return value
    return None


def _pairs_assigned(node: AssignmentStmt) -> Iterator[tuple[Expression, Expression]]:
    for target in node.lvalues:
        if isinstance(target, TupleExpr) and isinstance(node.rvalue, TupleExpr):
            yield from zip(target.items, node.rvalue.items, strict=False)
        else:
            yield target, node.rvalue


def _own_name(expr: Expression) -> str | None:
    of_self = isinstance(expr, MemberExpr) and isinstance(expr.expr, NameExpr)
    return expr.name if of_self and isinstance(expr, MemberExpr) else None


def _in_constructor(checker: Any) -> Iterator[Node]:
    info = checker.scope.enclosing_class()
    found = None if info is None else info.names.get("__init__")
    if found is not None and isinstance(found.node, FuncDef):
        yield from below(found.node.body)


# --- what its parameters are ------------------------------------------------------------------


def _parameters(callee: Expression, checker: Any) -> list[Kinds]:
    """Declared placements of the parameters; where there are none, nothing is known of one."""
    name = _own_name(callee)
    found: list[Kinds] = []
    for node in _in_constructor(checker) if name else ():
        if isinstance(node, CallExpr) and _is_ref(node.callee, _DECLARE) and len(node.args) > 1:
            declared = node.args[1]
            if isinstance(declared, DictExpr):
                found += _matching(f"{name}", declared, checker)
    return found or [{}]


def _matching(name: str, declared: DictExpr, checker: Any) -> Iterator[Kinds]:
    tried = (f"{name}.weight", f"{name}.0.weight", f"{name}.bias")
    for key, value in declared.items:
        if isinstance(key, StrExpr) and any(fnmatchcase(one, key.value) for one in tried):
            yield _written(value, checker) or {}


def _written(value: Expression, checker: Any) -> Kinds | None:
    """The kinds in an expression `Placed[Tensor, TP[R]]`, or of an alias."""
    if isinstance(value, RefExpr) and isinstance(value.node, TypeAlias):
        return kinds_of(value.node.target)
    if not isinstance(value, IndexExpr) or not isinstance(value.base, RefExpr):
        return None
    if value.base.fullname != PLACED or not isinstance(value.index, TupleExpr):
        return None
    kinds: dict[str, str] = {}
    for item in value.index.items[1:]:
        role = role_named(item.base, checker.modules) if isinstance(item, IndexExpr) else None
        kind = _kind(item.index) if isinstance(item, IndexExpr) else None
        if role is not None and kind is not None:
            kinds[role] = kind
    return kinds


def _kind(expr: Expression) -> str | None:
    if isinstance(expr, RefExpr):
        return KIND_NAMES.get(expr.fullname)
    base = expr.base if isinstance(expr, IndexExpr) else None
    if isinstance(expr, IndexExpr) and isinstance(base, RefExpr) and base.fullname in SHARD_NAMES:
        return f"S({expr.index.value})" if isinstance(expr.index, IntExpr) else None
    return None
