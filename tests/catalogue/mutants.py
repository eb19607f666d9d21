"""Every move, sum, exchange, axis, scale and annotation of the layer, changed by a program."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tests.catalogue.code import Edit, source_of

FILES = [  # of spmd_moe.layer
    "router_logits",
    "router",
    "boundary",
    "balance_losses",
    "selection_bias",
    "expert_load",
    "shared_experts",
    "experts",
    "combine",
    "moe",
    "dispatch.local",
    "dispatch.ragged_exchange",
    "dispatch.all_to_all",
    "dispatch.dedup_all_to_all",
    "dispatch.all_gather",
    "dispatch.fixed_capacity",
]
# An annotation becomes another that is as long: the kinds differ, the tensor does not.
RETYPED = {
    "Tokens": "TokenSums",
    "TokenSums": "Tokens",
    "Whole": "Tokens",
    "Rows": "RowSums",
    "RowSums": "Rows",
    "GatheredRows": "Rows",
    "GatheredTokens": "Tokens",
    "AllTokens": "Rows",
    "RouterWeight": "Whole",
    "SharedWeight": "Whole",
    "BatchTotals": "Sums",
    "GroupTotals": "GroupSums",
    "GroupSums": "GroupTotals",
    "Sums": "BatchTotals",
}
# Only between roles that ranks in a test have differently.
OTHER_ROLES = {
    "TP": ("DP", "EP"),
    "DP": ("CP", "TP"),
    "CP": ("DP", "TP"),
    "EP": ("TP", "ETP"),
    "ETP": ("TP", "EP"),
}
# Calls that give back what they are given first, moved, summed or counted.
MOVERS = (
    "redistribute",
    "declare_sum",
    "declare_sums",
    "exchange",
    "reduce_on_tp",
    "sum_over",
    "count_in_backward",
)
AXES = ("self.tp", "self.ep", "self.etp")
IMPORTS = "CP, DP, EP, ETP, TP, I, P, R, Rows, RowSums, S, Tokens, TokenSums, Whole"
FUTURE = "from __future__ import annotations\n"


@dataclass(frozen=True)
class Mutant:
    """One changed place. `name` says where and what, and is stable while lines move."""

    file: str
    name: str
    line: int
    old: str
    new: str
    start: int
    end: int

    @property
    def module(self) -> str:
        return f"spmd_moe.layer.{self.file}"

    def source(self) -> str:
        """The file with the change; as many lines, except the import of what it may need."""
        source = source_of(self.module)
        filler = "\n" * (self.old.count("\n") - self.new.count("\n"))
        text = f"{source[: self.start]}({self.new}{filler}){source[self.end :]}"
        return text.replace(FUTURE, f"{FUTURE}from spmd_moe.core.placement import {IMPORTS}\n", 1)

    def edit(self) -> Edit:
        return Edit(self.module, source_of(self.module), self.source())

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.name}: {old} -> {new}"


def mutants(file: str) -> Iterator[Mutant]:
    source = source_of(f"spmd_moe.layer.{file}")
    begins = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    tree, numbers = ast.parse(source), dict[str, int]()
    for function, node in _places(tree, "module"):
        start = begins[node.lineno - 1] + node.col_offset
        end = begins[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        old = source[start:end]
        for how, new in dict.fromkeys(_changes(node, source)):
            if "".join(old.split()) == "".join(new.split()):
                continue
            where = f"{file}:{function}:{how}"
            numbers[where] = numbers.get(where, 0) + 1
            name = f"{where}:{numbers[where]}"
            yield Mutant(file, name, node.lineno, old, new, start, end)


def _places(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """Every expression, in the order of the file, with the name of the function around it."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = node.name
    if isinstance(node, ast.expr):
        yield function, node
    for child in ast.iter_child_nodes(node):
        yield from _places(child, function)


def _changes(node: ast.expr, source: str) -> Iterator[tuple[str, str]]:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            yield from _of_call(node, name, source)
        case ast.BinOp(left=left, op=ast.Div() | ast.Mult()):
            yield "factor left out", ast.unparse(left)
        case ast.Name(id=name) if name in RETYPED:
            yield "retyped", RETYPED[name]
        case ast.Subscript(value=ast.Name("mesh") | ast.Attribute(attr="mesh"), slice=ast.Name(id)):
            for other in OTHER_ROLES.get(id, ()):
                yield f"axis {other}", f"{ast.unparse(node.value)}[{other}]"
        case ast.Name(id="DENSE"):
            yield "an axis left out", "(DP, CP)"


def _of_call(call: ast.Call, name: str, source: str) -> Iterator[tuple[str, str]]:
    if name in MOVERS:
        yield "left out", ast.unparse(call.args[0])
    if name in ("redistribute", "declare_sum", "exchange"):
        yield from _on_other_axes(call, source)
    if name == "exchange":
        ends = {str(k.arg): ast.unparse(k.value) for k in call.keywords}
        swapped = {"sends": ends["receives"], "receives": ends["sends"]}
        yield "sent back", _with(call, swapped)
    if name == "redistribute":
        ends = {str(k.arg): ast.unparse(k.value) for k in call.keywords if k.arg in ("src", "dst")}
        yield "swapped", _with(call, {"src": ends["dst"], "dst": ends["src"]})
        for end, kind in ends.items():
            for other in ("R", "I", "P", "S(0)"):
                if other != kind:
                    yield f"{end}={other}", _with(call, {end: other})


def _on_other_axes(call: ast.Call, source: str) -> Iterator[tuple[str, str]]:
    axis = ast.unparse(call.args[1])
    own = axis.removesuffix(".group")
    for other in AXES:
        if own in AXES and other != own and f"{other}." in source.replace(", ", "., "):
            changed = ast.parse(ast.unparse(call), mode="eval").body
            assert isinstance(changed, ast.Call)
            changed.args[1] = ast.parse(axis.replace(own, other), mode="eval").body
            yield f"axis {other}", ast.unparse(changed)


def _with(call: ast.Call, new: dict[str, str]) -> str:
    changed = ast.parse(ast.unparse(call), mode="eval").body
    assert isinstance(changed, ast.Call)
    for keyword in changed.keywords:
        if keyword.arg in new:
            keyword.value = ast.parse(new[keyword.arg], mode="eval").body
    return ast.unparse(changed)
