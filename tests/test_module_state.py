"""Module-level state: docs/module_state.md lists all of it, each with why it is no argument."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.test_layering import ROOT, sources

LIST = ROOT / "docs" / "module_state.md"
CONTAINERS = (ast.List, ast.Dict, ast.Set)
STATEFUL = {"WeakKeyDictionary", "WeakIdKeyDictionary", "WeakValueDictionary", "WeakSet", "Library"}
STATEFUL |= {"ExitStack", "Lock", "RLock", "local", "ContextVar", "defaultdict", "deque", "count"}
MUTATORS = {"append", "add", "clear", "pop", "popitem", "remove", "discard", "update", "extend"}
MUTATORS |= {"setdefault", "insert"}
CACHES = {"cache", "lru_cache", "cached_property"}


def name_of(node: ast.expr | None) -> str:
    """The last part of `a.b.c`, of a call of it, or of an item of it."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """Names that a module assigns at its top level, with what they are first."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update((t.id, node.value) for t in targets if isinstance(t, ast.Name))
    return found


def changed(tree: ast.Module) -> set[str]:
    """Names whose object is changed somewhere, or which a function assigns again."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.update(node.names)
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(
            node.ctx, ast.Store | ast.Del
        ):
            found.add(node.value.id if isinstance(node.value, ast.Name) else "")
        call = node.func if isinstance(node, ast.Call) else None
        if isinstance(call, ast.Attribute) and call.attr in MUTATORS:
            found.add(name_of(call.value))
    return found


def mutable_classes(tree: ast.Module) -> set[str]:
    """Classes of the module whose objects can be changed."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and not any("frozen=True" in ast.unparse(d) for d in node.decorator_list)
    }


def state(source: str) -> Iterator[str]:
    """Names of a module that hold something which can be another later."""
    tree = ast.parse(source)
    names, mutated, classes = assigned(tree), changed(tree), mutable_classes(tree)
    for name, value in names.items():
        empty = isinstance(value, CONTAINERS) and not ast.unparse(value).strip("[]{}")
        called = name_of(value) if isinstance(value, ast.Call) else ""
        if name in mutated or empty or called in STATEFUL | classes | CACHES:
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = {name_of(d) for d in node.decorator_list}
            if decorators & (CACHES - {"cached_property"}):
                yield node.name


def listed() -> set[str]:
    rows = (line for line in LIST.read_text().splitlines() if line.startswith("| `"))
    return {match[1] for row in rows if (match := re.match(r"\| `([\w.]+)` \|", row))}


def test_the_list_is_complete() -> None:
    found = {f"{file}.{name}" for file, source in sources().items() for name in state(source)}
    assert found == listed()


def test_each_row_says_why() -> None:
    for row in LIST.read_text().splitlines():
        if row.startswith("| `"):
            _, _, holds, why, _ = row.split("|")
            assert len(holds) > 10 and len(why) > 9, row


PROGRAM = """
from functools import cache
A = []
B: dict[str, int] = {}
C = {"a": 1}
D = {"a": 1}
D["b"] = 2
E = WeakKeyDictionary()
F = G = None
class _Here(local): pass
H = _Here()
@dataclass(frozen=True)
class Row: pass
I = Row()
J = cache(len)
def f():
    global F
    F = 1
    C2 = []
    C2.append(1)
@cache
def k(): pass
"""


def test_the_scan_sees_state_and_no_constants() -> None:
    assert set(state(PROGRAM)) == {"A", "B", "D", "E", "F", "H", "J", "k"}
