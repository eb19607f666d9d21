"""Loading a target by its name: `package.module:callable` or `path/to/file.py:callable`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import cast

from spmd_moe.check.target import COMMAND_LINE, Target, cannot, line_of_error
from spmd_moe.core.messages import one_line

_WHY = "a target is a callable (mesh, tokens) -> Case in a module that can be imported"


def load(name: str) -> Target:
    """The target of that name; modules of the current folder are found too."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        what = f"{name!r} does not have the form package.module:callable"
        fixes = "my_package.my_module:target", "path/to/file.py:target"
        raise cannot("TARGET", what, _WHY, *fixes, at=COMMAND_LINE)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _module(module_name)
    target: object = module
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        there = [n for n, v in vars(module).items() if _may_be_meant(module, n, v)]
        what = f"{module_name!r} has no callable {attribute!r}"
        meant = (f"{module_name}:{n}" for n in there[:3] or ["target"])
        raise cannot("TARGET", what, _WHY, *meant, at=COMMAND_LINE)
    return cast(Target, target)


def _may_be_meant(module: ModuleType, name: str, value: object) -> bool:
    own = getattr(value, "__module__", "") == module.__name__
    return own and callable(value) and not name.startswith("_")


def _module(name: str) -> ModuleType:
    path = Path(name) if name.endswith(".py") or "/" in name else None
    if path is not None and not path.is_file():
        what = f"there is no file {name!r}"
        raise cannot("TARGET", what, _WHY, "path/to/file.py:target", at=COMMAND_LINE)
    dotted = name if path is None else _dotted(path)
    try:
        return import_module(dotted) if path is None or dotted else _from_file(path)
    except Exception as error:  # an import may raise anything
        what = f"{name!r} cannot be imported: {type(error).__name__}: {one_line(error)}"
        command = f"python {name}" if path is not None else f"python -c 'import {name}'"
        at = line_of_error(error) or COMMAND_LINE
        raise cannot("TARGET", what, _WHY, f"{command}   # must work", at=at) from error


def _dotted(path: Path) -> str:
    """The name by which a file of a package below the current folder is imported, or nothing."""
    folder = Path.cwd()
    if not path.resolve().is_relative_to(folder):
        return ""
    parts = path.resolve().relative_to(folder).with_suffix("").parts
    packages = (folder.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts)))
    whole = all(part.isidentifier() for part in parts) and all(p.is_file() for p in packages)
    return ".".join(parts) if whole and path.suffix == ".py" else ""


def _from_file(path: Path) -> ModuleType:
    name = path.stem if path.stem not in sys.modules else f"target_{path.stem}"
    spec = spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # as `python path` has it
    spec.loader.exec_module(module)
    return module
