"""The exceptions of spmd_moe, and the one place where their messages are built.

A message has five parts in a fixed order: where it happened, what is there and what is needed, why
that cannot work, what to write instead, and the line of the user's program. Shapes and types may
stand in it, values never: a value can be secret, huge, or different on every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import FrameType

from spmd_types import SpmdTypeError
from torch import Tensor


class SpmdMoeError(Exception):
    """Every error that spmd_moe raises on purpose."""


class PlacementError(SpmdMoeError, SpmdTypeError):
    """A placement that cannot be. Not a TypeError: Python's operators would swallow that."""


class ShapeError(SpmdMoeError, ValueError):
    """A size that contradicts another, or that the ranks cannot share."""


class DtypeError(SpmdMoeError, ValueError):
    """A dtype that does not fit, or a precision that nobody chose."""


class ConfigError(SpmdMoeError, ValueError):
    """Settings that contradict each other."""


class RoutingError(SpmdMoeError, ValueError):
    """Scores or expert ids that no token can be sent by."""


class CheckpointError(SpmdMoeError, RuntimeError):
    """A checkpoint that cannot be written, or is not what the program needs."""


class GradientError(SpmdMoeError, RuntimeError):
    """Gradients that are not in the state that a step needs."""


class MeshError(SpmdMoeError, ValueError):
    """Degrees, axes or ranks that do not make a mesh."""


class OutputError(SpmdMoeError, AttributeError):
    """The record that the layer returns, used as if it was a tensor."""


class SanitizerError(SpmdMoeError, RuntimeError):
    """Ranks of a running job that hold something else than their types say."""


def plural(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


# Frames below these packages are ours or our tools', never the line that the user has to change.
_NOT_THE_USER = ("spmd_moe", "spmd_types", "torch", "contextlib", "runpy", "threading")
_HERE = str(Path(__file__).parents[1])


def explain(
    where: str, what: str, *, why: str, fixes: Iterable[str] = (), at: str | None = None
) -> str:
    """The text of an error: `what` says what is there and what is needed."""
    lines = [f"{where}: {what}.", f"  why: {why}."]
    lines += [f"  fix: {fix}" for fix in fixes]
    lines.append(f"  at:  {at or users_line()}")
    return "\n".join(lines)


def describe(x: Tensor) -> str:
    """A tensor without its values: `bf16[96, 512]`."""
    return f"{short_dtype(x.dtype)}{list(x.shape)}"


def short_dtype(dtype: object) -> str:
    """`bf16` for torch.bfloat16, `f32` for torch.float32, `i64` for torch.int64."""
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i")):
        if name.startswith(long) and name.removeprefix(long).isdigit():
            return short + name.removeprefix(long)
    return name


def users_line(frame: FrameType | None = None) -> str:
    """`file:line` of the innermost frame outside this package and its tools, from `frame` up."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        # An intercepted function runs code of this package with the globals of the program.
        if package not in _NOT_THE_USER and not frame.f_code.co_filename.startswith(_HERE):
            return f"{_short_path(frame.f_code.co_filename)}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "unknown"


@lru_cache(maxsize=256)
def _short_path(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename
