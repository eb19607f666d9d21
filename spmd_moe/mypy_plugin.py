"""The mypy plugin: placements are checked before anything runs. Enable it with one line:

    [tool.mypy]
    plugins = ["spmd_moe.mypy_plugin"]

Everything is in `static/`. mypy drops its whole cache when this file changes, so it stays as it is.
"""

from __future__ import annotations

from spmd_moe.static.plugin_entry import SpmdMoePlugin


def plugin(version: str) -> type[SpmdMoePlugin]:
    return SpmdMoePlugin
