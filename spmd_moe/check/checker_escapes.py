"""Uses of the type checker's escapes in checked code (X3), read from the source.

Patching the escapes at run time would miss decorators that are already applied and names that are
already imported.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator, Mapping, Set

from spmd_moe.check.findings import Finding, allowed, finding, short_path

ESCAPES = {
    "no_typecheck": "no check follows what runs under it",
    "register_no_typecheck": "no check follows what it names",
    "mutate_type": "it changes the type of a tensor without changing its values",
}


def escapes(ran: Mapping[str, Set[int]]) -> Iterator[Finding]:
    """Findings for the escapes in functions of which a line ran, and outside of functions."""
    for file, lines in sorted(ran.items()):
        for line, name, span in _used(file, "".join(linecache.getlines(file))):
            entered = span is None or any(span[0] <= n <= span[1] for n in lines)
            if entered and not allowed(name, file, line):
                at = f"{short_path(file)}:{line}"
                yield finding(
                    "X3",
                    at,
                    name,
                    "it is used in checked code",
                    ESCAPES[name],
                    "redistribute(x, axis, src=..., dst=...)   # changes values and type together",
                    f"# spmd: allow {name} - <reason>   # on that line",
                )


Span = tuple[int, int] | None


@functools.lru_cache(maxsize=256)
def _used(file: str, text: str) -> tuple[tuple[int, str, Span], ...]:
    """Lines that use an escape, each with the lines of its function; imports do not count."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # the input of a console
        return ()
    renamed = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return tuple(dict.fromkeys(_in(tree, None, renamed)))


def _in(node: ast.AST, span: Span, renamed: Mapping[str, str]) -> Iterator[tuple[int, str, Span]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        span = first, node.end_lineno or node.lineno
    if isinstance(node, ast.Name | ast.Attribute):
        name = renamed.get(node.id, "") if isinstance(node, ast.Name) else node.attr
        if name in ESCAPES:
            yield node.lineno, name, span
    for child in ast.iter_child_nodes(node):
        yield from _in(child, span, renamed)
