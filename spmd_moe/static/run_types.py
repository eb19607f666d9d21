"""`spmd-moe types`, in its own process: mypy with the plugin, and a table of known placements.

python -m spmd_moe.static.run_types [--strict] PATH ...
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from spmd_moe.core.messages import plural

if TYPE_CHECKING:
    from spmd_moe.static.coverage import Coverage  # imports mypy, which may be missing

PLUGIN = "spmd_moe.mypy_plugin"
_ERROR = re.compile(r": error: .*\[([\w-]+)\]$")


def main(words: Sequence[str]) -> int:
    """Run the command; 0 if no errors are found, 1 if some are, 2 if it cannot check."""
    strict, paths = "--strict" in words, [word for word in words if word != "--strict"]
    missing = next((path for path in paths if not Path(path).exists()), None)
    if missing is not None:
        return _cannot(f"there is no file or directory {missing!a}")
    try:
        import_module("mypy.version")  # is it installed at all?
    except ImportError:
        return _cannot("mypy is not installed: pip install 'spmd-moe[mypy]'")
    try:
        import_module(PLUGIN)  # it refuses versions that it does not know
    except ImportError as error:
        return _cannot(str(error))
    return _checked(paths, strict)


def _checked(paths: Sequence[str], strict: bool) -> int:
    from mypy import build, main
    from mypy.errors import CompileError

    from spmd_moe.static import plugin_entry
    from spmd_moe.static.coverage import coverage, found_in, table

    try:
        sources, options = main.process_options([*paths], program="spmd-moe types")
    except SystemExit:  # mypy has said why
        return 2
    if PLUGIN not in options.plugins:
        options.plugins = [*options.plugins, PLUGIN]
        options.cache_dir = os.path.join(options.cache_dir, "spmd_moe")
    options.export_types = options.preserve_asts = True
    options.pretty = False
    options.show_error_end = options.show_absolute_path = options.show_column_numbers = False
    for source in sources:  # a module given as text is not read from the cache
        if source.path is not None and Path(source.path).is_file():
            source.text = Path(source.path).read_text(encoding="utf-8")
    if strict:
        plugin_entry.ALWAYS_STRICT.extend(source.module for source in sources)
    try:
        result = build.build(sources, options)
    except CompileError as error:
        print("\n".join(error.messages), file=sys.stderr)
        return 2
    own, others = _sorted(result.errors)
    if own:
        print("\n".join(own), end="\n\n")
    type_of = found_in(result.types)
    trees = [result.files[source.module] for source in sources if source.module in result.files]
    rows = [coverage(tree, type_of) for tree in trees]
    print(table(rows))
    return _summary(rows, own, others)


def _sorted(messages: Sequence[str]) -> tuple[list[str], int]:
    """The messages about placements, and the number of other mypy errors."""
    own: list[str] = []
    others, ours = 0, False
    for line in messages:
        error = _ERROR.search(line)
        if error or ": error: " in line:
            ours = error is not None and error[1].startswith("placement")
            others += not ours
        if ours or "note: Revealed placement" in line:
            own.append(line)
    return own, others


def _summary(rows: Sequence[Coverage], own: Sequence[str], others: int) -> int:
    placed = sum(row.placed for row in rows)
    unannotated = sum(row.unannotated for row in rows)
    found = sum(": error: " in line for line in own)
    print()
    if unannotated:
        without = plural(unannotated, "function")
        print(f"without annotations, so not checked by mypy: {without}")
    if others:
        print(f"other mypy errors, which `mypy` prints: {others}")
    if not placed and not found:
        print(
            "nothing was checked: no function here names a placement, such as\n"
            "    def forward(self, x: Placed[Tensor, DP[V], TP[R]]) -> Placed[Tensor, DP[V], TP[R]]"
        )
        return 2
    print(plural(found, "placement error") if found else "no placement errors")
    return 1 if found else 0


def _cannot(why: str) -> int:
    print(f"spmd-moe types: {why}; see spmd-moe types --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
