"""Small placement mistakes, made by a program in the files of the layer itself."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    "router",
    "losses",
    "experts",
    "shared",
    "combine",
    "load",
    "moe",
    "dispatch/local",
    "dispatch/all_to_all",
    "dispatch/all_gather",
]
KINDS = ["R", "I", "P", "S(0)"]
CALLS = ("redistribute", "declare_sum", "exchange")


@final
@dataclass(frozen=True, slots=True)
class Mutant:
    """One file with one mistake. `name` says which, and is stable while lines move."""

    name: str
    source: str


def mutants() -> Iterator[Mutant]:
    for file in FILES:
        text = (ROOT / "spmd_moe" / f"{file}.py").read_text()
        for number, call in enumerate(_calls(ast.parse(text))):
            where = f"{file}:{_function_of(text, call.lineno)}:{number}"
            for what, changed in _mistakes(call):
                yield Mutant(f"{where}:{what}", _with(text, call, changed))


def _calls(tree: ast.Module) -> list[ast.Call]:
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _called(n) in CALLS]
    return sorted(found, key=lambda n: (n.lineno, n.col_offset))


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _mistakes(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """The call left out; and with other kinds at its ends."""
    yield "left out", call.args[0]
    ends = {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg in ("src", "dst")}
    if len(ends) < 2:
        return
    yield "swapped", _with_ends(call, {"src": ends["dst"], "dst": ends["src"]})
    for end, kind in ends.items():
        for other in KINDS:
            if other != kind and end is not None:
                yield f"{end}={other}", _with_ends(call, {end: other})


def _with_ends(call: ast.Call, ends: dict[str, str]) -> ast.Call:
    changed = copy.deepcopy(call)
    for keyword in changed.keywords:
        if keyword.arg in ends:
            keyword.value = ast.parse(ends[keyword.arg], mode="eval").body
    return changed


def _with(text: str, call: ast.Call, changed: ast.expr) -> str:
    """The source with one call replaced, on as many lines as before; all kinds are imported."""
    lines = text.splitlines(keepends=True)
    assert call.end_lineno is not None and call.end_col_offset is not None
    head = lines[call.lineno - 1][: call.col_offset]
    tail = lines[call.end_lineno - 1][call.end_col_offset :]
    filler = "\n" * (call.end_lineno - call.lineno)
    lines[call.lineno - 1 : call.end_lineno] = [f"{head}({ast.unparse(changed)}){tail}{filler}"]
    source = "".join(lines)
    future = "from __future__ import annotations\n"
    return source.replace(future, f"{future}from spmd_moe.placement import I, P, R, S\n", 1)


def _function_of(text: str, line: int) -> str:
    """The innermost function around a line."""
    around = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or line)
    ]
    return max(around, key=lambda node: node.lineno).name if around else "module"
