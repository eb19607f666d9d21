"""Source lines of the code that is checked, found in the stack."""

from __future__ import annotations

from types import CodeType, FrameType
from typing import final

from spmd_moe.signatures.interception import TRAMPOLINE


@final
class Lines:
    """Which lines of checked code are being run."""

    def __init__(self, packages: set[str], stop: str) -> None:
        self.packages, self.stop = packages, stop
        self.function: dict[tuple[str, int], str] = {}
        self._ours: dict[CodeType, bool | None] = {}  # None: what is outside of it runs the check

    def here(self, frame: FrameType | None) -> tuple[tuple[str, int], ...]:
        """File and line of every frame of checked code, the innermost last."""
        found: list[tuple[str, int]] = []
        while frame is not None:
            code = frame.f_code
            if code not in self._ours:
                runs = frame.f_globals.get("__name__") in _RUNS
                self._ours[code] = None if runs else is_checked(frame, self.packages)
            ours = self._ours[code]
            if ours is None:
                break
            if ours:
                line = (code.co_filename, frame.f_lineno)
                if not found:
                    self.function[line] = code.co_qualname
                found.append(line)
            elif found and code.co_filename == self.stop:
                break
            frame = frame.f_back
        return tuple(reversed(found))


def is_checked(frame: FrameType, packages: set[str]) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    if frame.f_code.co_filename == TRAMPOLINE:
        return False
    return name.partition(".")[0] in packages and not name.startswith(_NOT_CHECKED)


_RUNS = ("spmd_moe.check.trace", "spmd_moe.check.compare_one_process")

# The typed collectives are what checked code stands on; their insides have types of their own.
_NOT_CHECKED = (
    "spmd_moe.check",
    "spmd_moe.signatures",
    "spmd_moe.core.autograd_function",
    "spmd_moe.core.collectives",
    "spmd_moe.core.moves",
    "spmd_moe.core.host_values",
    "spmd_moe.core.redistribute",
)
