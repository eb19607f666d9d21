"""A module after mypy has checked it: what is declared compared with what was found, and reported.

mypy knows the type of every expression by now, and with it the placement. Calls, returns,
assignments and branches are compared here; what was wrong in an operation was written down.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeGuard

from mypy.nodes import (
    AssignmentExpr,
    AssignmentStmt,
    CallExpr,
    ConditionalExpr,
    DictExpr,
    Expression,
    FuncDef,
    IndexExpr,
    LambdaExpr,
    ListExpr,
    MemberExpr,
    NameExpr,
    Node,
    OpExpr,
    OverloadedFuncDef,
    ReturnStmt,
    RevealExpr,
    StrExpr,
    TupleExpr,
    Var,
    YieldExpr,
)
from mypy.subtypes import is_subtype
from mypy.types import (
    CallableType,
    FunctionLike,
    Instance,
    ProperType,
    TupleType,
    Type,
    TypedDictType,
    UnionType,
    get_proper_type,
)

from spmd_moe.static.arguments import matched, signatures
from spmd_moe.static.branches import branch_problems
from spmd_moe.static.bypass import Bypasses
from spmd_moe.static.config import Config
from spmd_moe.static.kinds import shown
from spmd_moe.static.messages import Problem, declared_problem, named
from spmd_moe.static.notes import Notes
from spmd_moe.static.overrides import override_problem
from spmd_moe.static.report import Line, Report
from spmd_moe.static.roles import is_role
from spmd_moe.static.strict import unknown_problems
from spmd_moe.static.types import DEPTH, SEQUENCES, as_found, each_kinds_of, kinds_of, signature_of
from spmd_moe.static.walk import children


def review(checker: Any, notes: Notes, config: Config) -> list[Line]:
    """Everything there is to say of a module."""
    module: str = checker.tree.fullname
    report = Report(checker, module)
    for variable, where in notes.roles(module):
        if not is_role(variable):
            what = f"Placed: {variable.name} is not a role"
            report.problem(Problem("annotation", what, "a role names a mesh axis"), where)
    for context, problem in notes.problems(module):
        report.problem(problem, context)
    reviewer = _Review(checker, report)
    reviewer.visit(checker.tree, None)
    strict = config.is_strict(module)
    if strict:
        unknown = unknown_problems(checker.tree, reviewer.type_of)
        bypasses = Bypasses(checker.tree, reviewer.type_of).problems(checker.tree, {})
        for problem, place in chain(unknown, bypasses):
            report.problem(problem, place)
    report.finish(strict=strict)
    return report.lines


class _Review:
    def __init__(self, checker: Any, report: Report) -> None:
        self.checker, self.report = checker, report

    def type_of(self, expr: Expression) -> Type | None:
        try:
            t: Type = self.checker.lookup_type(expr)
        except KeyError:  # not checked: unreachable, or in a function without annotations
            return None
        return as_found(t) if isinstance(expr, CallExpr | OpExpr | IndexExpr) else t

    def visit(self, node: Node, function: FuncDef | None) -> None:
        if isinstance(node, FuncDef):
            function = node
            self._defaults(node)
            self._branches(node)
            self._override(node)
        elif isinstance(node, CallExpr):
            self._call(node)
        elif isinstance(node, ReturnStmt) and node.expr is not None and function is not None:
            self._result(node.expr, function)
        elif isinstance(node, AssignmentStmt):
            for target in node.lvalues:
                self._assign(target, node.rvalue)
        elif isinstance(node, AssignmentExpr):
            self._assign(node.target, node.value)
        elif isinstance(node, ConditionalExpr):
            self._conditional(node)
        elif isinstance(node, YieldExpr) and node.expr is not None and function is not None:
            self._yield(node.expr, function)
        elif isinstance(node, RevealExpr) and node.expr is not None:
            self._reveal(node, node.expr)
        if isinstance(node, LambdaExpr):
            function = None
        for child in children(node):
            self.visit(child, function)

    # --- each construct -----------------------------------------------------------------------

    def _call(self, call: CallExpr) -> None:
        for signature in signatures(self.type_of(call.callee)):
            for expr, name, need in matched(call, signature, self.type_of):
                where = f"{named(call.callee)}, argument {name or '?'}"
                self._compare(expr, need, "argument", where)

    def _result(self, expr: Expression, function: FuncDef) -> None:
        declared = _declared_result(function)
        if function.is_generator:
            generator = get_proper_type(declared)
            args = generator.args if isinstance(generator, Instance) else ()
            declared = args[2] if len(args) == 3 else None
        if declared is not None:
            self._compare(expr, declared, "return", f"{function.name}, result")

    def _yield(self, expr: Expression, function: FuncDef) -> None:
        declared = get_proper_type(_declared_result(function))
        if isinstance(declared, Instance) and declared.args:
            self._compare(expr, declared.args[0], "return", f"{function.name}, what it yields")

    def _assign(self, target: Expression, value: Expression) -> None:
        if isinstance(target, TupleExpr | ListExpr) and isinstance(value, TupleExpr | ListExpr):
            for t, v in zip(target.items, value.items, strict=False):
                self._assign(t, v)
        elif isinstance(target, TupleExpr | ListExpr):
            items = get_proper_type(self.type_of(value))
            if isinstance(items, TupleType):
                for t, item in zip(target.items, items.items, strict=False):
                    self._compare_types(item, self._declared(t), value, "assignment", named(t))
        else:
            self._compare(value, self._declared(target), "assignment", named(target))

    def _declared(self, target: Expression) -> Type | None:
        """The declared type of what is assigned to; None where it was inferred."""
        if isinstance(target, IndexExpr):
            return self._item(target)
        if isinstance(target, NameExpr | MemberExpr):
            variable = target.node
            if variable is None and isinstance(target, MemberExpr):
                owner = get_proper_type(self.type_of(target.expr))
                found = owner.type.get(target.name) if isinstance(owner, Instance) else None
                variable = None if found is None else found.node
            if isinstance(variable, Var) and not variable.is_inferred:
                return variable.type
            if isinstance(variable, OverloadedFuncDef) and variable.is_property:
                setter = signature_of(variable.items[-1])
                return None if setter is None else setter.arg_types[-1]
        return None

    def _item(self, target: IndexExpr) -> Type | None:
        """What `__setitem__` takes for such an index."""
        method = get_proper_type(target.method_type)
        index = self.type_of(target.index)
        if index is None or not isinstance(method, FunctionLike):
            return None
        for item in method.items:
            if len(item.arg_types) == 2 and is_subtype(index, item.arg_types[0]):
                return item.arg_types[1]
        return None

    def _conditional(self, node: ConditionalExpr) -> None:
        one, other = (self.type_of(e) for e in (node.if_expr, node.else_expr))
        have, need = kinds_of(one), kinds_of(other)
        if have and need:
            problem = declared_problem("branch", "if ... else", named(node.if_expr), have, need)
            self.report.problem(problem, node)

    def _reveal(self, node: RevealExpr, expr: Expression) -> None:
        kinds = kinds_of(self.type_of(expr))
        if kinds is not None:
            self.report.note(f'Revealed placement is "{shown(kinds)}"', node)

    def _defaults(self, function: FuncDef) -> None:
        for argument in function.arguments:
            if argument.initializer is not None and argument.variable.type is not None:
                where = f"{function.name}, default of {argument.variable.name}"
                self._compare(argument.initializer, argument.variable.type, "assignment", where)

    def _branches(self, function: FuncDef) -> None:
        for problem, where in branch_problems(function, self.type_of):
            self.report.problem(problem, where)

    def _override(self, function: FuncDef) -> None:
        if function.info:
            self.report.problem(override_problem(function), function)

    # --- comparing ----------------------------------------------------------------------------

    def _compare(self, expr: Expression, need: Type | None, code: str, where: str) -> None:
        """An expression with the type that is declared for it, item by item where it has items."""
        if need is None:
            return
        if isinstance(expr, ConditionalExpr):
            self._compare(expr.if_expr, need, code, where)
            self._compare(expr.else_expr, need, code, where)
            return
        needed = get_proper_type(need)
        if isinstance(expr, TupleExpr | ListExpr) and _has_items(needed):
            each = needed.items if isinstance(needed, TupleType) else needed.args * len(expr.items)
            for item, t in zip(expr.items, each, strict=False):
                self._compare(item, t, code, where)
            return
        if isinstance(expr, DictExpr):
            for key, value in expr.items:
                self._compare(value, _value_at(key, needed), code, where)
            return
        self._compare_types(self.type_of(expr), need, expr, code, where)

    def _compare_types(
        self,
        have: Type | None,
        need: Type | None,
        expr: Expression,
        code: str,
        where: str,
        depth: int = 0,
    ) -> None:
        if have is None or need is None or depth > DEPTH:
            return
        found, wanted = kinds_of(have), kinds_of(need)
        if found is not None and wanted is not None:
            self._compare_kinds(have, need, expr, code, where)
            return
        have, need = _without_none(have), _without_none(need)
        if isinstance(have, TupleType) and isinstance(need, TupleType):
            pairs = zip(have.items, need.items, strict=False)
        elif isinstance(have, Instance) and isinstance(need, Instance):
            pairs = zip(have.args, need.args, strict=False)
        elif isinstance(have, CallableType) and isinstance(need, CallableType):
            pairs = zip([have.ret_type], [need.ret_type], strict=True)
        else:
            return
        for one, other in pairs:
            self._compare_types(one, other, expr, code, where, depth + 1)

    def _compare_kinds(
        self, have: Type, need: Type, expr: Expression, code: str, where: str
    ) -> None:
        """Each placement that it may have must be one of those that it may have there."""
        for found in each_kinds_of(have):
            problems = [
                declared_problem(code, where, named(expr), found, wanted)
                for wanted in each_kinds_of(need)
            ]
            if None not in problems:
                self.report.problem(problems[0], expr)
                return


def _has_items(t: Type) -> TypeGuard[TupleType | Instance]:
    return isinstance(t, TupleType) or (
        isinstance(t, Instance) and t.type.fullname in SEQUENCES and len(t.args) == 1
    )


def _value_at(key: Expression | None, mapping: ProperType) -> Type | None:
    """What a mapping is to have at a key; without a key, another mapping stands there (`**`)."""
    if key is None:
        return mapping
    if isinstance(mapping, TypedDictType):
        return mapping.items.get(key.value) if isinstance(key, StrExpr) else None
    return mapping.args[1] if isinstance(mapping, Instance) and len(mapping.args) == 2 else None


def _without_none(t: Type) -> Type:
    p = get_proper_type(t)
    if isinstance(p, UnionType):
        items = p.relevant_items()
        return get_proper_type(items[0]) if len(items) == 1 else p
    return p


def _declared_result(function: FuncDef) -> Type | None:
    t = None if function.type is None else get_proper_type(function.type)
    if not isinstance(t, CallableType):
        return None
    if function.is_coroutine:
        declared = get_proper_type(t.ret_type)
        if isinstance(declared, Instance) and len(declared.args) == 3:
            return declared.args[2]
    return t.ret_type
