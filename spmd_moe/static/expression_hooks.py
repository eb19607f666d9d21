"""Hooks of expressions: the type of a call, an operator or an attribute.

Nothing is reported from here. mypy evaluates an expression more than once, and takes an error in an
operator as a sign to try the reflected one; so problems are written down and reported at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mypy.nodes import (
    CallExpr,
    ComparisonExpr,
    Expression,
    ForStmt,
    GeneratorExpr,
    IndexExpr,
    IntExpr,
    ListComprehension,
    ListExpr,
    MemberExpr,
    NameExpr,
    OpExpr,
    RefExpr,
    TupleExpr,
    UnaryExpr,
    Var,
)
from mypy.plugin import AttributeContext, FunctionContext, MethodContext
from mypy.types import Type

from spmd_moe.static.annotations import KIND_NAMES, ROLE_LISTS
from spmd_moe.static.collective_calls import SEVERAL, Call, moved
from spmd_moe.static.kinds import Kinds
from spmd_moe.static.messages import Named, Problem, named, operation_problem
from spmd_moe.static.operator_rules import Operand, gradient, infer_operation, table
from spmd_moe.static.placed_types import (
    is_any,
    is_number,
    kind_value,
    kinds_of,
    place,
    role_of,
    tensor,
    tensors_in,
    with_kind_value,
    with_role,
)
from spmd_moe.static.problems_found import Notes
from spmd_moe.static.reassigned_names import grows, widen
from spmd_moe.static.role_names import Modules, is_role, role_made_by, role_name
from spmd_moe.static.syntax_tree import below
from spmd_moe.static.torch_names import is_foreign

Context = FunctionContext | MethodContext


# --- operations of torch ----------------------------------------------------------------------


def operation(ctx: Context, name: str, notes: Notes) -> Type:
    """Any operation of torch: a function, a method, an operator, indexing."""
    checker: Any = ctx.api
    if is_foreign(checker.tree.fullname + "."):  # torch's own code
        return ctx.default_return_type
    receiver = ctx.type if isinstance(ctx, MethodContext) else None
    operands = list(_operands(ctx, receiver))
    tensors = [n.operand for n in operands if n.operand.kinds is not None]
    if not any(o.kinds for o in tensors) and (tensors or name not in _factories()):
        return ctx.default_return_type
    if name in table()["pass_through"]:  # asks for a size and the like, or gives back what it got
        notes.record(ctx, None)
        return place(ctx.default_return_type, tensors[0].kinds or {})
    result, refusal = infer_operation(name, [n.operand for n in operands])
    problem = None if refusal is None else operation_problem(name, operands, refusal)
    if problem is None and receiver is not None and _in_place(name):
        problem = _changed_in_place(name, operands[0], result)
        target = _receiver(ctx.context, None)
        began_fresh = notes.assignments(checker).began_fresh(target)
        if problem is not None and began_fresh and grows(operands[0].operand.kinds or {}, result):
            problem = None
        if problem is None and began_fresh:
            widen(checker, target, result)
    notes.record(ctx, problem)
    widen(checker, notes.assignments(checker).target_of(ctx.context), result)
    return place(_typed(ctx, name, receiver), result)


def _typed(ctx: Context, name: str, receiver: Type | None) -> Type:
    """What torch says that a method returns, or what it does not say of a few."""
    found = None if receiver is None else tensor(receiver)
    if found is None or not is_any(ctx.default_return_type):
        return ctx.default_return_type
    if name in ("Tensor.split", "Tensor.split_with_sizes"):
        return ctx.api.named_generic_type("builtins.tuple", [found])
    if name == "Tensor.unbind":  # a loop over the rows
        return ctx.api.named_generic_type("typing.Iterator", [found])
    return found if name in ("Tensor.unflatten", "Tensor.norm") else ctx.default_return_type


def _factories() -> list[str]:
    names: list[str] = table()["factories"]
    return names


def _operands(ctx: Context, receiver: Type | None) -> Iterator[Named]:
    """Tensors and numbers of a call, in their positions."""
    first = 0
    if receiver is not None:
        first = 1
        argument = next((e for exprs in ctx.args for e in exprs), None)
        text = named(_receiver(ctx.context, argument))
        for found in tensors_in(receiver):
            yield Named(Operand(0, kinds_of(found) or {}), text)
    for position, (types, exprs) in enumerate(zip(ctx.arg_types, ctx.args, strict=True), first):
        names = ctx.arg_names[position - first]
        for t, expr, given in zip(types, exprs, names, strict=True):
            if given == "out":
                continue
            yield from _operand(ctx, t, expr, position, given)


def _operand(
    ctx: Context, t: Type, expr: Expression, position: int, keyword: str | None
) -> Iterator[Named]:
    items = expr.items if isinstance(expr, ListExpr | TupleExpr) else ()
    if items:  # mypy would give the join of the items
        for item in items:
            yield from _operand(ctx, _type_of(ctx, item), item, position, keyword)
        return
    if isinstance(expr, ListComprehension | GeneratorExpr):
        made = expr.generator if isinstance(expr, ListComprehension) else expr
        checker: Any = ctx.api
        t = checker.lookup_type(made.left_expr)
    if is_number(t):
        yield Named(Operand(position, None, keyword), named(expr))
        return
    for found in tensors_in(t):
        yield Named(Operand(position, kinds_of(found) or {}, keyword), named(expr))


def _type_of(ctx: Context, expr: Expression) -> Type:
    return ctx.api.get_expression_type(expr)


def _receiver(context: object, argument: Expression | None) -> Expression | None:
    if isinstance(context, CallExpr) and isinstance(context.callee, MemberExpr):
        return context.callee.expr
    if isinstance(context, OpExpr):
        return context.right if argument is context.left else context.left
    if isinstance(context, ComparisonExpr):
        return next((e for e in context.operands if e is not argument), None)
    if isinstance(context, UnaryExpr):
        return context.expr
    base = getattr(context, "base", None) or getattr(context, "lvalue", None)
    return base if isinstance(base, Expression) else None


def _in_place(name: str) -> bool:
    method = name.rpartition(".")[2]
    augmented = method.startswith("__i") and method not in ("__invert__", "__index__", "__int__")
    return augmented or method == "__setitem__" or (method.endswith("_") and method[-2] != "_")


def _changed_in_place(name: str, target: Named, result: Kinds) -> Problem | None:
    """X4: what stands in a tensor may change, its placement may not."""
    for role, kind in (target.operand.kinds or {}).items():
        after = result.get(role, kind)
        if after not in (kind, "?") and not (kind[0] == "S" and after == "V"):
            method = name.rpartition(".")[2]
            return Problem(
                "operation",
                f"{method}: {target.text} is {kind} on {role}, and would become {after} in place",
                "others who hold this tensor would still take it for what it was",
                (f"make a new tensor instead of changing {target.text}",),
            )
    return None


# What is read from a tensor as an attribute, and is a tensor.
ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag", "grad", "data"})


def attribute(ctx: AttributeContext, name: str, notes: Notes) -> Type:
    """`x.T` and its like; `x.grad`; `x.data`; and the parts of what topk and sort return."""
    kinds = next((k for k in map(kinds_of, tensors_in(ctx.type)) if k is not None), None)
    if kinds is None:
        return ctx.default_attr_type
    short = name.rpartition(".")[2]
    if short == "grad":
        return place(ctx.default_attr_type, {r: gradient(k) for r, k in kinds.items()})
    if short == "data" or not name.startswith("Tensor."):
        return place(ctx.default_attr_type, kinds)
    result, _ = infer_operation(name, [Operand(0, kinds)])
    return place(ctx.default_attr_type, result)


# --- axes and kinds as values -----------------------------------------------------------------


def axis_of_mesh(ctx: MethodContext, notes: Notes) -> Type:
    """`mesh[TP]`"""
    expr = ctx.args[0][0] if ctx.args and ctx.args[0] else None
    checker: Any = ctx.api
    role = role_named(expr, checker.modules) or _roles_of_loop(checker, expr)
    return ctx.default_return_type if role is None else with_role(ctx.default_return_type, role)


def role(ctx: FunctionContext, notes: Notes) -> Type:
    """`Role("north")`"""
    made = role_made_by(ctx.context) if isinstance(ctx.context, CallExpr) else None
    return ctx.default_return_type if made is None else with_role(ctx.default_return_type, made)


def _roles_of_loop(checker: Any, expr: Expression | None) -> str | None:
    """`mesh[role]` where `role` runs over roles that are written down."""
    function = checker.scope.current_function()
    variable = expr.node if isinstance(expr, NameExpr) else None
    if function is None or not isinstance(variable, Var):
        return None
    for node in below(function):
        if isinstance(node, ForStmt):
            pairs = [(node.index, node.expr)]
        elif isinstance(node, GeneratorExpr):
            pairs = list(zip(node.indices, node.sequences, strict=True))
        else:
            continue
        for index, over in pairs:
            if isinstance(index, NameExpr) and index.node is variable:
                return _roles_written(over, checker.modules)
    return None


def _roles_written(over: Expression, modules: Modules) -> str | None:
    if isinstance(over, RefExpr) and over.fullname in ROLE_LISTS:
        return SEVERAL.join(ROLE_LISTS[over.fullname])
    if not isinstance(over, TupleExpr | ListExpr):
        return None
    roles = [role_named(item, modules) for item in over.items]
    return None if None in roles else SEVERAL.join(r for r in roles if r is not None)


def role_named(expr: Expression | None, modules: Modules) -> str | None:
    """The role that an expression names, if it is a constant of some module."""
    if not isinstance(expr, RefExpr) or not isinstance(expr.node, Var):
        return None
    variable = expr.node
    if "." not in variable.fullname or not is_role(variable):
        return None
    return role_name(variable, modules)


def group_of_axis(ctx: AttributeContext, notes: Notes) -> Type:
    """`axis.group`"""
    role = role_of(ctx.type)
    return ctx.default_attr_type if role is None else with_role(ctx.default_attr_type, role)


def shard_kind(ctx: Context, notes: Notes) -> Type:
    """`S(0)`, `S[0]`"""
    expr = ctx.args[0][0] if ctx.args and ctx.args[0] else None
    dim = _int_of(expr)
    return (
        ctx.default_return_type
        if dim is None
        else with_kind_value(ctx.default_return_type, f"S({dim})")
    )


def _int_of(expr: Expression | None) -> int | None:
    if isinstance(expr, IntExpr):
        return expr.value
    if isinstance(expr, UnaryExpr) and expr.op == "-" and isinstance(expr.expr, IntExpr):
        return -expr.expr.value
    return None


def kind_of_expr(ctx: Context, expr: Expression | None) -> str | None:
    """The kind that an argument such as `src=P` or `dst=S(0)` is."""
    if isinstance(expr, RefExpr) and expr.fullname in KIND_NAMES:
        return KIND_NAMES[expr.fullname]
    return None if expr is None else kind_value(_type_of(ctx, expr))


# --- collectives ------------------------------------------------------------------------------


def collective(ctx: FunctionContext, function: str, notes: Notes) -> Type:
    """`redistribute` and spmd_types' own."""
    x, axis = _argument(ctx, "x"), _argument(ctx, "axis", "group")
    kinds = None if x is None else kinds_of(_type_of(ctx, x))
    role = None if axis is None else role_of(_type_of(ctx, axis))
    if role is not None and SEVERAL in role and not _is_loops_own(axis):
        role = None
    src, dst = (_end(ctx, function, end) for end in ("src", "dst"))
    result, problem = moved(Call(function, named(x), kinds, role, src, dst))
    notes.record(ctx, problem, keep=role is not None and SEVERAL in role)
    if (role is None or SEVERAL in role) and result is not None:
        _forget(x, result)
    elif result is not None:
        checker: Any = ctx.api
        widen(checker, notes.assignments(checker).target_of(ctx.context), result)
    t = ctx.default_return_type
    if tensor(t) is None and x is not None:
        found = tensor(_type_of(ctx, x))  # spmd_types does not say what its collectives return
        t = t if found is None else found
    return t if result is None else place(t, result)


def _is_loops_own(axis: Expression | None) -> bool:
    """Whether an axis is a loop's variable, and not one that was picked from a list."""
    if isinstance(axis, MemberExpr) and axis.name == "group":
        return _is_loops_own(axis.expr)
    if isinstance(axis, IndexExpr):  # mesh[role] itself
        return isinstance(axis.index, NameExpr)
    return isinstance(axis, NameExpr)


def _forget(x: Expression | None, kinds: Kinds) -> None:
    """A move on an unknown axis is a move in a loop over axes, and has its own name.

    Where mypy merges what a variable is before and after a loop, it falls back on what it was first
    found to be; so that must not say more than is true in the end.
    """
    variable = x.node if isinstance(x, NameExpr) else None
    if isinstance(variable, Var) and variable.is_inferred and variable.type is not None:
        variable.type = place(variable.type, kinds)


def _end(ctx: FunctionContext, function: str, end: str) -> str | None:
    if function.endswith(".declare_sum"):
        return {"src": "V", "dst": "P"}[end]
    given = _argument(ctx, end)
    if given is None:
        default: str | None = table()["defaults"].get(function.rpartition(".")[2], {}).get(end)
        return default
    return kind_of_expr(ctx, given)


def _argument(ctx: Context, *names: str) -> Expression | None:
    for name, exprs in zip(ctx.callee_arg_names, ctx.args, strict=True):
        if name in names and exprs:
            return exprs[0]
    return None


def exchange(ctx: FunctionContext, notes: Notes) -> Type:
    """Rows go where data says: they are V on every axis, and stay so."""
    x = _argument(ctx, "x")
    kinds = None if x is None else kinds_of(_type_of(ctx, x))
    if kinds is None:
        return ctx.default_return_type
    wrong = {role: kind for role, kind in kinds.items() if kind[0] not in "VS?"}
    problem = None
    if wrong:
        role, kind = next(iter(wrong.items()))
        problem = Problem(
            "move",
            f"exchange: {named(x)} is {kind} on {role}, and V is needed",
            "which rows a rank gets is data, so on every axis a rank has rows of its own",
            (f"redistribute({named(x)}, mesh[{role}], src={kind}, dst=S(0))",)
            if kind in "RIP"
            else (),
        )
    notes.record(ctx, problem)
    return place(ctx.default_return_type, dict.fromkeys(kinds, "V"))
