"""Strict mode: code that a checker cannot follow (X3), or that differs between ranks (X2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mypy.nodes import (
    AssignmentStmt,
    Block,
    BreakStmt,
    CallExpr,
    ClassDef,
    ConditionalExpr,
    Context,
    ContinueStmt,
    Decorator,
    Expression,
    FuncDef,
    IfStmt,
    IndexExpr,
    MemberExpr,
    MypyFile,
    NameExpr,
    Node,
    RefExpr,
    ReturnStmt,
    TupleExpr,
    Var,
    WhileStmt,
    WithStmt,
)
from mypy.types import Instance, Type, get_proper_type

from spmd_moe.static.collective_calls import MEETINGS
from spmd_moe.static.messages import Problem, named
from spmd_moe.static.placed_types import tensor, tensors_in
from spmd_moe.static.strict_mode import is_kernel
from spmd_moe.static.syntax_tree import below, children

TypeOf = Callable[[Expression], Type | None]
Found = Iterator[tuple[Problem, Context]]

# What a program asks of torch.distributed without moving a tensor.
_ASKS = frozenset(
    {"get_rank", "get_world_size", "get_group_rank", "get_backend", "is_initialized"}
    | {"is_available", "get_process_group_ranks", "init_process_group", "destroy_process_group"}
)
_NO_GRAD = frozenset(
    f"torch.{module}{name}"
    for module in ("", "autograd.grad_mode.")
    for name in ("no_grad", "inference_mode", "set_grad_enabled")
)
_UNCHECKED = {
    "no_typecheck": "the checker of a run is off in it",
    "mutate_type": "a tensor is another kind by decree",
    "register_no_typecheck": "the checker of a run is off in it",
}
_RANKS = frozenset({"get_rank", "get_local_rank", "get_group_rank", "get_node_local_rank"})
_CUTS = frozenset({"narrow", "select", "index_select", "roll", "split", "chunk", "slice_scatter"})
_MAKES = frozenset(
    {"zeros", "ones", "empty", "full", "arange", "new_zeros", "new_ones", "new_empty", "new_full"}
    | {"view", "reshape", "expand", "repeat", "narrow", "unflatten", "broadcast_to"}
)


class Bypasses:
    """One module. `meets` are its own functions in which ranks meet."""

    def __init__(self, tree: MypyFile, type_of: TypeOf) -> None:
        self.type_of = type_of
        self.meets: set[Node] = set()
        functions = [node for node in below(tree) if isinstance(node, FuncDef)]
        while found := {f for f in functions if f not in self.meets and self._meet(f.body)}:
            self.meets |= found

    def problems(self, node: Node, tainted: dict[Var, str]) -> Found:
        """`tainted` are variables that hold a rank, or a number out of a tensor."""
        if isinstance(node, ClassDef) and is_kernel(node):
            return
        if isinstance(node, FuncDef):
            tainted = dict(tainted)
        elif isinstance(node, CallExpr):
            yield from self._call(node, tainted)
        elif isinstance(node, MemberExpr) and node.name == "data" and self._is_tensor(node.expr):
            yield self._bypass(f"{named(node)}: its gradient ends here", node)
        elif isinstance(node, IndexExpr) and self._has_tensor(node.base):
            if self._taint(node.index, tainted) == "rank":
                yield self._size(f"{named(node.base)} is cut by a rank's number", node)
        elif isinstance(node, IfStmt | WhileStmt | ConditionalExpr):
            yield from self._branch(node)
        elif isinstance(node, Block):
            yield from self._left_early(node)
        elif isinstance(node, WithStmt):
            if any(self._is_no_grad(e) for e in node.expr) and self._meet(node.body):
                yield self._bypass("no_grad around a collective", node)
        elif isinstance(node, Decorator):
            if any(map(self._is_no_grad, node.decorators)) and self._meet(node.func.body):
                yield self._bypass("no_grad around a collective", node.func)
        elif isinstance(node, AssignmentStmt):
            self._note(node, tainted)
        for child in children(node):
            yield from self.problems(child, tainted)

    # --- X3: past the checker -----------------------------------------------------------------

    def _call(self, call: CallExpr, tainted: dict[Var, str]) -> Found:
        full = self._fullname(call.callee)
        name = full.rpartition(".")[2]
        if full.startswith("torch.distributed.") and name not in _ASKS and name[0].islower():
            yield self._bypass(f"{named(call.callee)}: a collective without a placement", call)
        elif full.startswith("spmd_types.") and name in _UNCHECKED:
            yield self._bypass(f"{name}: {_UNCHECKED[name]}", call)
        elif full in ("Tensor.detach", "Tensor.detach_", "torch.detach"):
            yield self._bypass(f"{named(call)}: its gradient ends here", call)
        taints = {self._taint(argument, tainted) for argument in call.args}
        if name in _CUTS and "rank" in taints and self._touches_tensor(call):
            yield self._size(f"{name}: a rank's number says what is cut out", call)
        elif name in _MAKES and "value" in taints and full.startswith(("torch.", "Tensor.")):
            yield self._size(f"{name}: a number out of a tensor is a size", call)

    def _bypass(self, what: str, where: Context) -> tuple[Problem, Context]:
        why = "what happens there is not followed, so placements after it may be wrong"
        return Problem("bypass", what, why, ("# spmd: allow bypass - <reason>",)), where

    # --- X2: what ranks would do differently --------------------------------------------------

    def _branch(self, node: IfStmt | WhileStmt | ConditionalExpr) -> Found:
        conditions = _conditions(node)
        if not any(self._asks_shape(n) for c in conditions for n in below(c)):
            return
        bodies = [child for child in children(node) if child not in conditions]
        if any(self._meet(body) for body in bodies):
            yield self._size("a shape decides whether there is a collective", node)

    def _left_early(self, block: Block) -> Found:
        """`if x.shape[0] == 0: return x`, and below it a collective."""
        for number, statement in enumerate(block.body):
            if not isinstance(statement, IfStmt) or not any(map(_leaves, statement.body)):
                continue
            asks = any(self._asks_shape(n) for c in statement.expr for n in below(c))
            if asks and any(map(self._meet, block.body[number + 1 :])):
                yield self._size("a shape decides whether the collectives below happen", statement)

    def _size(self, what: str, where: Context) -> tuple[Problem, Context]:
        why = "it may differ between ranks, or agree by accident, and no type says which"
        fixes = ("redistribute(..., shape=...)", "# spmd: allow size - <reason>")
        return Problem("size", what, why, fixes), where

    def _asks_shape(self, node: Node) -> bool:
        """`x.shape`, `x.size(0)`, `x.numel()`, `len(x)`"""
        if isinstance(node, MemberExpr):
            return node.name in ("shape", "size", "numel") and self._is_tensor(node.expr)
        length = isinstance(node, CallExpr) and self._fullname(node.callee) == "builtins.len"
        return length and isinstance(node, CallExpr) and any(map(self._is_tensor, node.args))

    def _note(self, node: AssignmentStmt, tainted: dict[Var, str]) -> None:
        taint = self._taint(node.rvalue, tainted)
        for target in node.lvalues:
            for item in target.items if isinstance(target, TupleExpr) else [target]:
                variable = item.node if isinstance(item, NameExpr) else None
                if isinstance(variable, Var):
                    tainted.pop(variable, None)
                    if taint is not None:
                        tainted[variable] = taint

    def _taint(self, expr: Expression, tainted: dict[Var, str]) -> str | None:
        """`rank` or `value` for a number that depends on one; tensors have placements instead."""
        if self._has_tensor(expr):
            return None
        for node in below(expr):
            if isinstance(node, NameExpr) and isinstance(node.node, Var) and node.node in tainted:
                return tainted[node.node]
            if isinstance(node, MemberExpr) and node.name == "rank" and self._is_axis(node.expr):
                return "rank"
            if isinstance(node, CallExpr):
                name = self._fullname(node.callee)
                if name.rpartition(".")[2] in _RANKS:
                    return "rank"
                if name in ("Tensor.item", "Tensor.tolist"):
                    return "value"
                if name in ("builtins.int", "builtins.round") and self._is_tensor(node.args[0]):
                    return "value"
        return None

    # --- what things are ----------------------------------------------------------------------

    def _fullname(self, callee: Expression) -> str:
        """Methods of tensors as `Tensor.name`, of others by their class."""
        if isinstance(callee, MemberExpr):
            owner = self.type_of(callee.expr)
            if tensor(owner) is not None:
                return f"Tensor.{callee.name}"
            p = None if owner is None else get_proper_type(owner)
            if isinstance(p, Instance) and p.type.fullname != "types.ModuleType":
                return f"{p.type.fullname}.{callee.name}"
        return callee.fullname if isinstance(callee, RefExpr) else ""

    def _meet(self, node: Node) -> bool:
        return any(isinstance(n, CallExpr) and self._is_meeting(n.callee) for n in below(node))

    def _is_meeting(self, callee: Expression) -> bool:
        if isinstance(callee, RefExpr) and (
            callee.fullname in MEETINGS or callee.node in self.meets
        ):
            return True
        if not isinstance(callee, MemberExpr):
            return False
        owner = self.type_of(callee.expr)
        p = None if owner is None else get_proper_type(owner)
        found = p.type.get(callee.name) if isinstance(p, Instance) else None
        return found is not None and found.node in self.meets

    def _is_no_grad(self, expr: Expression) -> bool:
        callee = expr.callee if isinstance(expr, CallExpr) else expr
        return isinstance(callee, RefExpr) and callee.fullname in _NO_GRAD

    def _is_axis(self, expr: Expression) -> bool:
        p = get_proper_type(self.type_of(expr))
        return isinstance(p, Instance) and p.type.fullname == "spmd_moe.core.mesh.Axis"

    def _is_tensor(self, expr: Expression) -> bool:
        return tensor(self.type_of(expr)) is not None

    def _has_tensor(self, expr: Expression) -> bool:
        t = self.type_of(expr)
        return t is not None and any(True for _ in tensors_in(t))

    def _touches_tensor(self, call: CallExpr) -> bool:
        receiver = [call.callee.expr] if isinstance(call.callee, MemberExpr) else []
        return any(self._has_tensor(e) for e in [*receiver, *call.args])


def _conditions(node: IfStmt | WhileStmt | ConditionalExpr) -> list[Expression]:
    if isinstance(node, ConditionalExpr):
        return [node.cond]
    return node.expr if isinstance(node, IfStmt) else [node.expr]


def _leaves(body: Block) -> bool:
    """An error is no way of leaving: it ends the program on all ranks."""
    return bool(body.body) and isinstance(body.body[-1], ReturnStmt | ContinueStmt | BreakStmt)
