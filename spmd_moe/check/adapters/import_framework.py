"""Importing a framework from a directory, with empty modules for what a layer does not need."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, final

from spmd_moe.check.target import cannot


@contextmanager
def empty_modules(names: Iterable[str]) -> Iterator[list[str]]:
    """Inside, each of these modules that is missing is an empty one; which they are."""
    missing = [name for name in names if _is_missing(name)]
    finder = _Empty(frozenset(missing))
    sys.meta_path.insert(0, finder)
    try:
        yield missing
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Module):
                del sys.modules[name]


def _is_missing(name: str) -> bool:
    """`torch.utils.tensorboard` is there, and is as missing as the package that it is of."""
    return find_spec(name.rpartition(".")[2]) is None


def framework(name: str, path: str | None) -> types.ModuleType:
    """The framework, from these directories first."""
    for folder in reversed((path or "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        found = import_module(name)
    except Exception as error:  # an import may raise anything
        why = f"{type(error).__name__}: {_first_line(error)}"
        fix = f"pip install {name}   # or --path DIRECTORY"
        raise cannot("TARGET", f"{name} cannot be imported", why, fix) from error
    folders = tuple(os.path.abspath(folder) for folder in (path or "/").split(os.pathsep))
    if not str(found.__file__).startswith(folders):
        why = "a process has one version of a package; it was imported before from elsewhere"
        raise cannot("TARGET", f"{name} is {found.__file__}", why, "a process for each version")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


def member(module: str, *names: str) -> Any:
    """The first of the names that a module has, or the module; else the version is not known."""
    try:
        found = import_module(module)
    except Exception as error:  # an import may raise anything
        raise _unknown(module, names, error) from error
    if not names:
        return found
    for name in names:
        if hasattr(found, name):
            return getattr(found, name)
    raise _unknown(module, names, None)


def has(module: str, name: str) -> bool:
    try:
        return hasattr(import_module(module), name)
    except ImportError:
        return False


def _unknown(module: str, names: Sequence[str], error: Exception | None) -> Exception:
    parts = module.split(".")
    above = (sys.modules.get(".".join(parts[:n])) for n in range(1, len(parts)))
    known = (getattr(found, "__version__", "") for found in above)
    version = next(filter(None, known), "of this version")
    what = f"{parts[0]} {version} has no {module}.{names[0] if names else ''}".rstrip(".")
    why = "its parts have other names or places than in the versions that are known"
    if error is not None:
        why = f"importing it raises {type(error).__name__}: {_first_line(error)}"
    return cannot("TARGET", what, why, "a target of your own: package.module:callable")


@final
class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of these packages: each name in them is a class that does nothing."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
        module.__version__ = "0"  # type: ignore[attr-defined]  # some ask


@final
class _Module(types.ModuleType):
    """Capital names are classes that do nothing; others are modules that do as decorators, too."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Module(name) if name[0].islower() else _nothing(name)
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: object) -> Any:
        return args[0] if args and callable(args[0]) else _as_it_is


def _as_it_is(function: Any) -> Any:
    return function


def _nothing(name: str) -> type:
    body: dict[str, Any] = {
        "__init__": lambda self, *args, **kwargs: None,
        "__getitem__": lambda self, item: self,
        "__class_getitem__": classmethod(lambda cls, item: cls),
    }
    return type(name, (), body)
