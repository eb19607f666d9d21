"""The position of a thread: the collective in which it waits, and the user's line."""

from __future__ import annotations

import linecache
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType
from typing import final

from spmd_moe.core.errors import describe
from spmd_moe.core.messages import PACKAGE, short_path, users_line

_WAITS = re.compile(r"\.(wait|synchronize)\(")
_COLLECTIVES = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")
_OWN = ("spmd_moe.train.hang_stack", "spmd_moe.train.hang_watch")
_MOVES = "spmd_moe.core.moves"  # names the collective; its caller is reported as the place
_OPERATORS = "torch._ops"  # its frames hold the operator as `self`
_ENGINE = "_engine_run_backward"  # the main thread, while other threads run backward


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """Where a thread stands.

    Attributes:
        collective: The collective in which it waits, or "" in other code.
        inside: The innermost function of this package that it is in, or "".
        at: The innermost line of the user's program.
    """

    collective: str
    inside: str
    at: str

    def __str__(self) -> str:
        inside = f", in {self.inside}" if self.inside else ""
        where = f"in {self.collective}" if self.collective else "outside of collectives"
        return f"{where}{inside}, called at {self.at}"


def standing(thread: int) -> Standing:
    """Where the thread with this ident stands.

    If it runs backward, other threads may be the ones that wait in collectives.
    """
    frames = sys._current_frames()
    frame = frames.get(thread)
    if frame is None:
        return Standing("", "", "the end of its thread")
    found = _of_frame(frame)
    if frame.f_code.co_name == _ENGINE and not found.collective:
        mine = threading.get_ident()
        others = (_of_frame(f) for ident, f in frames.items() if ident not in (thread, mine))
        other = next((each for each in others if each.collective), found)
        return Standing(other.collective, other.inside, found.at)
    return found


def _of_frame(frame: FrameType) -> Standing:
    return Standing(_collective(frame), _inside(frame), users_line(frame))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame, and those that called it, without those of the watch."""
    while frame is not None:
        if _module(frame) not in _OWN:
            yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _collective(frame: FrameType) -> str:
    """The collective that the innermost frames of torch are in, by the name that was called."""
    within = list(takewhile(lambda f: _module(f).partition(".")[0] == "torch", _callers(frame)))
    names = [
        f.f_code.co_name
        for f in within
        if _module(f) in _COLLECTIVES and not f.f_code.co_name.startswith("_")
    ]
    waited = next((f for f in within if f.f_code.co_name == "trigger_wait"), None)
    if waited is not None:
        result = waited.f_locals.get("self")
        name = str(getattr(result, "collective", "")) or "wait_tensor"
        elem = getattr(result, "elem", None)
        return name if elem is None else f"{name} of {describe(elem)}"
    if names:
        return names[-1]  # the outermost: what torch's caller asked for
    for f in within:
        operator = str(f.f_locals.get("self", "")) if _module(f) == _OPERATORS else ""
        if "c10d" in operator:
            return operator.rpartition("functional.")[2].removesuffix(".default")
    if within and _module(within[0]).startswith("torch.distributed."):
        return within[0].f_code.co_name  # FSDP waits for its works in functions of its own
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    waits = None if within else _WAITS.search(line)
    return waits[1] if waits else ""


def _inside(frame: FrameType) -> str:
    for f in _callers(frame):
        file = f.f_code.co_filename
        if file.startswith(PACKAGE) and _module(f) != _MOVES:
            return f"{f.f_code.co_name} ({short_path(file)}:{f.f_lineno})"
    return ""
