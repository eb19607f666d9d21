"""Exceptions of spmd_moe, and tensors and dtypes as their messages show them."""

from __future__ import annotations

from spmd_types import SpmdTypeError
from torch import Tensor

# The text itself is built without torch, for the static check too.
from spmd_moe.core.messages import explain as explain
from spmd_moe.core.messages import plural as plural
from spmd_moe.core.messages import users_line as users_line


class SpmdMoeError(Exception):
    """Base class of every error that spmd_moe raises on purpose.

    Example:
        >>> from spmd_moe import ShardShape, SpmdMoeError
        >>> try:
        ...     ShardShape.even(5, ranks=0)
        ... except SpmdMoeError as error:
        ...     print(type(error).__name__)
        ShapeError
    """


class PlacementError(SpmdMoeError, SpmdTypeError):
    """A placement, or a combination of placements, that is not allowed.

    It is not a TypeError, because Python's operators swallow those.

    Example:
        >>> from spmd_moe import TP, Placement, PlacementError, R, V
        >>> try:
        ...     Placement((TP[V], TP[R]))
        ... except PlacementError as error:
        ...     print(str(error).splitlines()[0])
        Placed: role TP stands twice in tp:V tp:R.
    """


class ShapeError(SpmdMoeError, ValueError):
    """A size that contradicts another, or that cannot be divided over the ranks.

    Example:
        >>> from spmd_moe import ShapeError, ShardShape
        >>> try:
        ...     ShardShape.ragged([2, -1])
        ... except ShapeError as error:
        ...     print(str(error).splitlines()[0])
        ShardShape: sizes [2, -1] has a negative entry; all must be 0 or more.
    """


class DtypeError(SpmdMoeError, ValueError):
    """A dtype that does not fit, or a low-precision reduction without a stated dtype.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from spmd_moe import TP, DtypeError, I, MoEMesh, R, redistribute
        >>> dist.init_process_group("fake", rank=0, world_size=2)
        >>> tp = MoEMesh.init("cpu", tp=2)[TP]
        >>> x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
        >>> try:
        ...     redistribute(x, tp, src=I, dst=R)  # backward would sum in bfloat16
        ... except DtypeError:
        ...     y = redistribute(x, tp, src=I, dst=R, grad_dtype=torch.float32)
    """


class ConfigError(SpmdMoeError, ValueError):
    """Settings that contradict each other.

    Example:
        >>> from spmd_moe import ConfigError, RouterConfig
        >>> try:
        ...     RouterConfig(num_experts=4, top_k=5)
        ... except ConfigError as error:
        ...     print(type(error).__name__)
        ConfigError
    """


class RoutingError(SpmdMoeError, ValueError):
    """Scores or expert ids with which no token can be routed, on some rank.

    Example:
        >>> import torch
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, RoutingError, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> try:
        ...     layer(torch.full((3, 8), float("nan")))
        ... except RoutingError as error:
        ...     print(type(error).__name__)
        RoutingError
    """


class CheckpointError(SpmdMoeError, RuntimeError):
    """A checkpoint that cannot be written, or that does not fit the model.

    Example:
        >>> from torch import nn
        >>> from spmd_moe import CheckpointError, MoEMesh, load_checkpoint
        >>> try:
        ...     load_checkpoint("no such folder", nn.Module(), MoEMesh.single())
        ... except CheckpointError as error:
        ...     print(type(error).__name__)
        CheckpointError
    """


class GradientError(SpmdMoeError, RuntimeError):
    """Gradients that are not in the state that a step needs, such as reduced twice.

    Example:
        >>> import torch
        >>> from spmd_moe import GradientError, MoE, MoEConfig, MoEMesh, RouterConfig
        >>> from spmd_moe import init_weights, reduce_gradients
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> layer(torch.ones(3, 8)).hidden.sum().backward()
        >>> reduce_gradients(layer, mesh)
        >>> try:
        ...     reduce_gradients(layer, mesh)
        ... except GradientError as error:
        ...     print(type(error).__name__)
        GradientError
    """


class MeshError(SpmdMoeError, ValueError):
    """Degrees, axes or ranks that do not make a mesh.

    Example:
        >>> import torch.distributed as dist
        >>> from spmd_moe import MeshError, MoEMesh
        >>> dist.init_process_group("fake", rank=0, world_size=4)
        >>> try:
        ...     MoEMesh.init("cpu", dp=3)
        ... except MeshError as error:
        ...     print(type(error).__name__)
        MeshError
    """


class OutputError(SpmdMoeError, AttributeError):
    """The record that the layer returns, used as if it was a tensor."""


class SanitizerError(SpmdMoeError, RuntimeError):
    """Ranks of a running job hold values that contradict their placements.

    All ranks raise the same error; see docs/sanitizer.md.

    Example:
        >>> from spmd_moe import SanitizerError, SpmdMoeError
        >>> issubclass(SanitizerError, SpmdMoeError)
        True
    """


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
