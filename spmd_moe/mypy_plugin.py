"""The mypy plugin: placements are checked before anything runs. Enable it with one line:

    [tool.mypy]
    plugins = ["spmd_moe.mypy_plugin"]

Everything is in `static/`. mypy drops its whole cache when this file changes, so it stays as it is.
"""

from __future__ import annotations

from mypy.version import __version__ as _version

_OLDEST = (2, 4)  # the plugin uses error codes with parents and hooks that older versions lack

if tuple(map(int, _version.split(".")[:2])) < _OLDEST:
    # mypy prints this as one line, behind "Error importing plugin".
    raise ImportError(
        f"mypy 2.4 or newer is needed, this is {_version}: pip install 'mypy>=2.4,<3'"
    )

from spmd_moe.static.plugin_entry import SpmdMoePlugin  # noqa: E402  # it fails on older versions


def plugin(version: str) -> type[SpmdMoePlugin]:
    return SpmdMoePlugin
