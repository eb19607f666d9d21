"""Real code with a few words replaced, loaded afresh beside the original.

A changed module has to be seen by all that import from it, so those are loaded afresh too; the rest
is shared. Afterwards everything is as it was.
"""

from __future__ import annotations

import ast
import functools
import importlib
import linecache
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
OURS = ("spmd_moe.", "tests.catalogue.")
LAYER = ("spmd_moe.check", "spmd_moe.__main__")  # these observe; they are never changed


@dataclass(frozen=True)
class Edit:
    """In `module`, `old`, which stands there exactly once, becomes `new`."""

    module: str
    old: str
    new: str


def path_of(module: str) -> Path:
    base = ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@functools.cache
def source_of(module: str) -> str:
    return path_of(module).read_text()


def changed_source(module: str, edits: Iterable[Edit]) -> str:
    text = source_of(module)
    for edit in edits:
        found = text.count(edit.old)
        assert found == 1, f"{module} has {found} times, not once:\n{edit.old}"
        text = text.replace(edit.old, edit.new)
    return text


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of ours that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(name for name in found if f"{name}.".startswith(OURS))


def affected(modules: Iterable[str]) -> set[str]:
    """The loaded modules that import from these, by however many steps; and these."""
    known = [n for n in sys.modules if n.startswith(OURS) and not n.startswith(LAYER)]
    reached = set(modules)
    while True:
        more = {n for n in known if n not in reached and imports(n) & reached}
        if not more:
            return reached
        reached |= more


@contextmanager
def changed(name: str, edits: Sequence[Edit], wanted: str) -> Iterator[ModuleType]:
    """The module `wanted`, as if the edits had been made. Their lines are in files under `name`."""
    importlib.import_module(wanted)
    by_module = {e.module: [x for x in edits if x.module == e.module] for e in edits}
    sources = {m: changed_source(m, es) for m, es in by_module.items()}
    fresh = affected(sources)
    before = {n: sys.modules[n] for n in fresh if n in sys.modules}
    # A package may give the name of a module to a function: `spmd_moe.hf.swap`.
    named = {n: _in_package(n) for n in before}
    finder = _Finder(name, sources)
    sys.meta_path.insert(0, finder)
    try:
        _forget(fresh)
        yield importlib.import_module(wanted)
    finally:
        sys.meta_path.remove(finder)
        _forget(fresh)
        sys.modules.update(before)
        for n, value in named.items():
            parent, _, last = n.rpartition(".")
            setattr(sys.modules[parent], last, value)


def _in_package(module: str) -> object:
    """What the package of a loaded module has under its name."""
    parent, _, last = module.rpartition(".")
    return vars(sys.modules[parent]).get(last, sys.modules[module])


def _forget(modules: Iterable[str]) -> None:
    for name in modules:
        sys.modules.pop(name, None)
    for name in modules:  # `from package import module` asks the package first
        parent, _, last = name.rpartition(".")
        if isinstance(vars(sys.modules.get(parent, sys)).get(last), ModuleType):
            delattr(sys.modules[parent], last)


class _Finder:
    """Finds changed modules before the real ones, and loads them."""

    def __init__(self, name: str, sources: dict[str, str]) -> None:
        self.sources = sources
        self.files = {m: f"{name}/{path_of(m).relative_to(ROOT)}" for m in sources}
        for module, file in self.files.items():
            lines = sources[module].splitlines(keepends=True)
            linecache.cache[file] = (len(sources[module]), None, lines, file)

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name not in self.sources:
            return None
        return spec_from_loader(name, self, is_package=path_of(name).name == "__init__.py")  # type: ignore[arg-type]  # the two methods are what is asked of a loader

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        code = compile(self.sources[module.__name__], self.files[module.__name__], "exec")
        exec(code, vars(module))
