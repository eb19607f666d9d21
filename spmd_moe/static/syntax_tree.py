"""Walks over mypy's syntax tree, whose own visitors cannot be subclassed from outside."""

from __future__ import annotations

from collections.abc import Iterator

from mypy import nodes
from mypy.nodes import Block, Node

# The parts of each kind of node that hold further nodes, in the order of the source.
_PARTS: dict[type[Node], str] = {
    nodes.MypyFile: "defs",
    nodes.Block: "body",
    nodes.ExpressionStmt: "expr",
    nodes.AssignmentStmt: "rvalue lvalues",
    nodes.OperatorAssignmentStmt: "lvalue rvalue",
    nodes.WhileStmt: "expr body else_body",
    nodes.ForStmt: "expr index body else_body",
    nodes.ReturnStmt: "expr",
    nodes.AssertStmt: "expr msg",
    nodes.DelStmt: "expr",
    nodes.IfStmt: "expr body else_body",
    nodes.RaiseStmt: "expr from_expr",
    nodes.TryStmt: "body handlers else_body finally_body",
    nodes.WithStmt: "expr target body",
    nodes.MatchStmt: "subject guards bodies",
    nodes.ClassDef: "decorators defs",
    nodes.FuncDef: "arguments body",
    nodes.Argument: "initializer",
    nodes.Decorator: "decorators func",
    nodes.OverloadedFuncDef: "items impl",
    nodes.CallExpr: "callee args",
    nodes.MemberExpr: "expr",
    nodes.OpExpr: "left right",
    nodes.ComparisonExpr: "operands",
    nodes.UnaryExpr: "expr",
    nodes.IndexExpr: "base index",
    nodes.SliceExpr: "begin_index end_index stride",
    nodes.CastExpr: "expr",
    nodes.AssertTypeExpr: "expr",
    nodes.RevealExpr: "expr",
    nodes.ListExpr: "items",
    nodes.TupleExpr: "items",
    nodes.SetExpr: "items",
    nodes.DictExpr: "items",
    nodes.ConditionalExpr: "cond if_expr else_expr",
    nodes.LambdaExpr: "arguments body",
    nodes.GeneratorExpr: "sequences condlists left_expr",
    nodes.ListComprehension: "generator",
    nodes.SetComprehension: "generator",
    nodes.DictionaryComprehension: "sequences condlists key value",
    nodes.AssignmentExpr: "value target",
    nodes.StarExpr: "expr",
    nodes.YieldExpr: "expr",
    nodes.YieldFromExpr: "expr",
    nodes.AwaitExpr: "expr",
}


def children(node: Node) -> Iterator[Node]:
    """The nodes directly below, except blocks that mypy has found unreachable."""
    meant = getattr(node, "analyzed", None)
    if isinstance(node, nodes.CallExpr) and isinstance(meant, Node):  # cast(...), reveal_type(...)
        yield meant
        return
    for part in _PARTS.get(type(node), "").split():
        yield from _nodes_in(getattr(node, part))


def _nodes_in(value: object) -> Iterator[Node]:
    if isinstance(value, Block) and value.is_unreachable:
        return
    if isinstance(value, Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nodes_in(item)


def below(node: Node) -> Iterator[Node]:
    """The node and everything below it."""
    yield node
    for child in children(node):
        yield from below(child)
