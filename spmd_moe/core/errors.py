"""Exceptions of spmd_moe, and tensors and dtypes as their messages show them."""

from __future__ import annotations

from spmd_types import SpmdTypeError
from torch import Tensor

# The text itself is built without torch, for the static check too.
from spmd_moe.core.messages import explain as explain
from spmd_moe.core.messages import plural as plural
from spmd_moe.core.messages import users_line as users_line


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
