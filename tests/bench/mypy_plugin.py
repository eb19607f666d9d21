"""The plugin with a clock at each of its doors: how much of a run of mypy is spent inside it.

Two runs of mypy differ by more than the plugin takes, on most machines. This is a share of one run.
What the clock itself takes counts as the plugin's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from time import perf_counter
from typing import Any, TypeVar

from mypy import api
from mypy.plugin import Plugin

A = TypeVar("A")


class Clock:
    """Seconds between the entrances and the exits; what is entered from inside counts once."""

    def __init__(self, spent: float) -> None:
        self.spent, self.calls, self._inside = spent, 0, False

    def on(self, run: Callable[..., A]) -> Callable[..., A]:
        @functools.wraps(run)
        def clocked(*args: Any) -> A:
            if self._inside:
                return run(*args)
            self._inside, begin = True, perf_counter()
            try:
                return run(*args)
            finally:
                self.spent += perf_counter() - begin
                self.calls, self._inside = self.calls + 1, False

        return clocked


import_module("mypy.main")  # mypy loads all of this anyway; it is not the plugin's
_begin = perf_counter()
ours = import_module("spmd_moe.mypy_plugin").SpmdMoePlugin
clock = Clock(perf_counter() - _begin)


def _with_clock(name: str) -> Callable[..., Any]:
    """A method of the plugin, and the hook that it gives mypy, if it does."""
    method = getattr(ours, name)
    if "_hook" not in name:
        return clock.on(method)

    def ask(self: Plugin, fullname: str) -> Any:
        hook = asked(self, fullname)
        return None if hook is None else clock.on(hook)

    asked = clock.on(method)
    return ask


DOORS = [n for n in dir(Plugin) if n.startswith(("get_", "report_"))]
Timed = type("Timed", (ours,), {n: _with_clock(n) for n in (*DOORS, "__init__")})


def plugin(version: str) -> type[Plugin]:
    """mypy's entry."""
    return Timed


def main() -> None:
    sys.modules["tests.bench.mypy_plugin"] = sys.modules[
        "__main__"
    ]  # mypy looks for it by this name
    begin = perf_counter() - clock.spent
    api.run(sys.argv[1:])
    share = clock.spent / (perf_counter() - begin)
    print(f"{share:.1%} of the time inside the plugin, which was entered {clock.calls} times")


if __name__ == "__main__":
    main()
