"""Annotated functions, found by their signatures, and seen at work without a line in them.

While boundaries are open, the code of each such function is that of `_instead`, which lets the
caller's observer see what goes in and what comes out. Every reference to the function leads there,
whoever imported it; when they are closed, the function is what it was, to the bytecode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import nn

from spmd_moe.core.placement import Placement
from spmd_moe.sanitize.signatures import (
    OPEN,
    Observer,
    annotated,
    modules_of,
    placements_in,
    watched,
)


@final
class Boundaries:
    """The annotated functions of some modules that have a placement of interest."""

    def __init__(self, model: nn.Module, matters: Callable[[Placement], bool]) -> None:
        self._watched = [
            watched(function, hints)
            for function, hints in annotated(modules_of(model))
            if any(matters(p) for hint in hints.values() for p in placements_in(hint))
        ]

    @property
    def names(self) -> list[str]:
        return sorted(each.name for each in self._watched)

    def open(self, observer: Observer) -> None:
        for number, each in enumerate(self._watched):
            key = f"{number} {each.name}"
            OPEN[key] = each, observer
            code = _instead.__code__
            consts = tuple(key if const == _KEY else const for const in code.co_consts)
            free = each.code.co_freevars  # a function keeps its cells, so their number too
            each.function.__code__ = code.replace(co_consts=consts, co_freevars=free)

    def close(self) -> None:
        for each in self._watched:
            each.function.__code__ = each.code
        OPEN.clear()


# --- in place of a function -------------------------------------------------------------------

_KEY = "the function's key"


def _instead(*args: Any, **kwargs: Any) -> Any:
    # Runs with the globals of another function, so what it needs is imported here.
    from spmd_moe.sanitize.signatures import pass_through

    key = "the function's key"
    return pass_through(key, args, kwargs)
