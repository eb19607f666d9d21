"""The mypy plugin: placements are checked before anything runs. Enable it with one line:

    [tool.mypy]
    plugins = ["spmd_moe.mypy_plugin"]

Everything is in `static/`. mypy drops its whole cache when this file changes, so it stays as it is.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed

from mypy.version import __version__ as _mypy


def _check(name: str, have: str, oldest: str, below: str) -> None:
    """mypy prints the error as one line, behind "Error importing plugin"."""
    found, least = ([int(n) for n in re.findall(r"\d+", v)[:3]] for v in (have, oldest))
    if found < least:
        raise ImportError(
            f"{name} {oldest} or newer is needed, this is {have}: "
            f"pip install '{name}>={oldest},<{below}'"
        )


# Older versions of mypy lack error codes with parents; of spmd_types, types for mypy.
_check("mypy", _mypy, "2.4", "3")
with suppress(PackageNotFoundError):  # a copy without metadata
    _check("spmd_types", _installed("spmd_types"), "0.3.1", "0.4")

from spmd_moe.static.plugin_entry import SpmdMoePlugin  # noqa: E402  # it fails on older versions


def plugin(version: str) -> type[SpmdMoePlugin]:
    return SpmdMoePlugin
