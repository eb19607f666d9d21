"""Ways around the type checker that stand in checked code: X3, read from the source.

Run-time patches would miss a decorator that has already been applied, or a name that was imported
early. The source has them all.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterable, Iterator

from spmd_moe.check.finding import Finding, allowed, finding, short

ESCAPES = {
    "no_typecheck": "what runs under it is followed by no check",
    "register_no_typecheck": "what it names is followed by no check",
    "mutate_type": "it gives a tensor another type and leaves its values as they are",
}


def escapes(files: Iterable[str]) -> Iterator[Finding]:
    for file in sorted(files):
        for line, name in _used(file, "".join(linecache.getlines(file))):
            if not allowed(name, file, line):
                at = f"{short(file)}:{line}"
                yield finding(
                    "X3",
                    at,
                    name,
                    "it is used in checked code",
                    ESCAPES[name],
                    "redistribute(x, axis, src=..., dst=...)   # changes values and type together",
                    f"# spmd: allow {name} - <reason>   # on that line",
                )


@functools.lru_cache(maxsize=256)
def _used(file: str, text: str) -> tuple[tuple[int, str], ...]:
    """Lines that use one of them; the line of an import is not one."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # not a file, but what a console was given
        return ()
    renamed = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            name = renamed.get(node.id, "")
        elif isinstance(node, ast.Attribute):
            name = node.attr
        else:
            continue
        if name in ESCAPES:
            found.append((node.lineno, name))
    return tuple(sorted(set(found)))
