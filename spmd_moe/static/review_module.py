"""Review of a module after mypy has checked it: declared placements against those found.

mypy knows the type of every expression by now, and with it the placement. Calls, returns,
assignments and branches are compared here; what was wrong in an operation was written down.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from mypy.nodes import (
    AssignmentExpr,
    AssignmentStmt,
    CallExpr,
    ClassDef,
    ConditionalExpr,
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
    RefExpr,
    ReturnStmt,
    RevealExpr,
    Statement,
    SymbolNode,
    TupleExpr,
    Var,
    YieldExpr,
)
from mypy.subtypes import is_subtype
from mypy.types import (
    CallableType,
    FunctionLike,
    Instance,
    TupleType,
    Type,
    get_proper_type,
)

from spmd_moe.static.branch_placements import alternatives, branch_problems
from spmd_moe.static.call_arguments import (
    PARTIAL,
    Actual,
    actuals,
    fitting,
    matched,
    operator_calls,
    signatures,
)
from spmd_moe.static.check_declared import Comparison, Found
from spmd_moe.static.error_report import Line, Report
from spmd_moe.static.kinds import shown
from spmd_moe.static.messages import Problem, declared_problem, named
from spmd_moe.static.override_placements import attribute_overrides, override_problem
from spmd_moe.static.placed_types import as_found, kinds_of, signature_of
from spmd_moe.static.problems_found import Notes
from spmd_moe.static.reassigned_names import in_order, is_parameter, uses
from spmd_moe.static.role_names import is_role
from spmd_moe.static.settings import Config
from spmd_moe.static.strict_code import Bypasses
from spmd_moe.static.strict_mode import unknown_problems
from spmd_moe.static.syntax_tree import children


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
        self._in_order: set[Statement] = set()
        # Parameters that are names of something else by now.
        self._taken_over: set[SymbolNode | None] = set()
        self.comparison = Comparison(self.type_of, lambda expr: alternatives(expr, checker))

    def type_of(self, expr: Expression) -> Type | None:
        try:
            t: Type = self.checker.lookup_type(expr)
        except KeyError:  # not checked: unreachable, or in a function without annotations
            return None
        return as_found(t) if isinstance(expr, CallExpr | OpExpr | IndexExpr) else t

    def visit(self, node: Node, function: FuncDef | None) -> None:
        if isinstance(node, FuncDef):
            function = node
            self._in_order.update(in_order(node.body))
            self._defaults(node)
            self._branches(node)
            self._override(node)
        elif isinstance(node, CallExpr):
            self._call(node)
        elif isinstance(node, ReturnStmt) and node.expr is not None and function is not None:
            self._result(node.expr, function)
        elif isinstance(node, AssignmentStmt):
            self._take_over(node)
            for target in node.lvalues:
                self._assign(target, node.rvalue)
        elif isinstance(node, AssignmentExpr):
            self._assign(node.target, node.value)
        elif isinstance(node, ConditionalExpr):
            self._conditional(node)
        elif isinstance(node, ClassDef):
            self._attributes(node)
        elif isinstance(node, YieldExpr) and node.expr is not None and function is not None:
            self._yield(node.expr, function)
        elif isinstance(node, RevealExpr) and node.expr is not None:
            self._reveal(node, node.expr)
        for op, method, operand in operator_calls(node, self.type_of):
            self._arguments(method, [Actual(operand)], op)
        if isinstance(node, LambdaExpr):
            function = None
        for child in children(node):
            self.visit(child, function)

    # --- each construct -----------------------------------------------------------------------

    def _call(self, call: CallExpr) -> None:
        callee, given = call.callee, actuals(call, self.type_of)
        self._arguments(self.type_of(callee), given, named(callee))
        if isinstance(callee, RefExpr) and callee.fullname == PARTIAL and given:
            self._arguments(self.type_of(given[0].expr), given[1:], named(given[0].expr))

    def _arguments(self, callee: Type | None, given: list[Actual], called: str) -> None:
        """The first of the overloads that mypy may have chosen counts, unless another fits."""
        for overloads in signatures(callee):
            each = [
                list(self._misplaced(given, signature, called))
                for signature in fitting(overloads, given, self.type_of)
            ]
            if [] not in each:
                self._tell(chain(*each[:1]))

    def _misplaced(self, given: list[Actual], signature: CallableType, called: str) -> Found:
        for actual, name, need in matched(given, signature, self.type_of):
            where = f"{called}, argument {name or '?'}"
            if actual.type is None:
                yield from self.comparison.expression(actual.expr, need, "argument", where)
                continue
            text = named(actual.expr)
            for problem in self.comparison.types(actual.type, need, "argument", where, text):
                yield problem, actual.expr

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

    def _take_over(self, node: AssignmentStmt) -> None:
        """A parameter that is made of itself, in the order of the body, is a new name."""
        for target in node.lvalues if node in self._in_order else ():
            for name in target.items if isinstance(target, TupleExpr) else [target]:
                if is_parameter(name) and uses(node.rvalue, name.node):
                    self._taken_over.add(name.node)

    def _assign(self, target: Expression, value: Expression) -> None:
        if isinstance(target, TupleExpr | ListExpr) and isinstance(value, TupleExpr | ListExpr):
            for t, v in zip(target.items, value.items, strict=False):
                self._assign(t, v)
        elif isinstance(target, TupleExpr | ListExpr):
            items = get_proper_type(self.type_of(value))
            if isinstance(items, TupleType):
                for t, item in zip(target.items, items.items, strict=False):
                    found = self.comparison.types(
                        item, self._declared(t), "assignment", named(t), named(value)
                    )
                    self._tell((problem, value) for problem in found)
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
                return None if variable in self._taken_over else variable.type
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
        either = alternatives(node, self.checker)
        have, need = (kinds_of(self.type_of(e)) for e in either) if len(either) == 2 else ({}, {})
        if have and need:
            problem = declared_problem("branch", "if ... else", named(either[0]), have, need)
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

    def _attributes(self, node: ClassDef) -> None:
        for where, mine, theirs, place in attribute_overrides(node.info):
            found = self.comparison.types(mine, theirs, "override", where, "its type")
            self._tell((problem, place) for problem in found)

    # --- comparing ----------------------------------------------------------------------------

    def _compare(self, expr: Expression, need: Type | None, code: str, where: str) -> None:
        self._tell(self.comparison.expression(expr, need, code, where))

    def _tell(self, found: Found) -> None:
        for problem, place in found:
            self.report.problem(problem, place)


def _declared_result(function: FuncDef) -> Type | None:
    t = None if function.type is None else get_proper_type(function.type)
    if not isinstance(t, CallableType):
        return None
    if function.is_coroutine:
        declared = get_proper_type(t.ret_type)
        if isinstance(declared, Instance) and len(declared.args) == 3:
            return declared.args[2]
    return t.ret_type
