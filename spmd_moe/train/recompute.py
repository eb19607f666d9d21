"""Activation checkpointing: backward runs a block's forward again; activations are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import update_wrapper
from typing import Any, TypeAlias, final

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.host_values import Reads
from spmd_moe.core.validate import describe_value

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# Results that are expensive to compute twice and cheap to keep: those of collectives; and the
# chosen experts, which a second forward in another precision might choose differently.
_KEPT_NAMESPACE, _KEPT = "_c10d_functional", (torch.ops.aten.topk.default,)


def recompute(blocks: Iterable[nn.Module], *, exchanges: bool = False) -> None:
    """Activation checkpointing: each block computes its forward again in backward.

    Call it before `parallelize`. Names, parameters and counters do not change.

    Args:
        blocks: The modules.
        exchanges: Whether exchanges run again too. Default: the results of exchanges and the chosen
            experts are saved, so nothing is sent twice.

    Raises:
        ConfigError: `blocks` is not a list of modules.

    Example:
        >>> import torch
        >>> from spmd_moe import recompute
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> recompute([layer])
        >>> layer(torch.ones(3, 8)).hidden.sum().backward()
    """
    contexts = _keep_nothing if exchanges else _keep_exchanges
    for block in _modules(blocks):
        vars(block)["forward"] = _Again(block.forward, contexts)


@final
class _Again:
    """A forward that backward runs again.

    An object that holds the block's bound method, not a function around it: `copy.deepcopy` does
    not copy functions, so the copy of a block would run the block that it was copied from.
    """

    def __init__(self, forward: Callable[..., Any], contexts: Callable[[], Contexts]) -> None:
        update_wrapper(self, forward)
        self._forward, self._contexts = forward, contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            self._forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs
        )


def _modules(blocks: object) -> list[nn.Module]:
    """The blocks as a list, checked before the first is changed."""
    asked = list(blocks) if isinstance(blocks, Iterable) else []
    modules = [block for block in asked if isinstance(block, nn.Module)]
    if len(modules) < len(asked) or not isinstance(blocks, Iterable):
        inside = "with other objects in it" if asked else "which is not iterable"
        raise ConfigError(
            explain(
                "recompute",
                f"blocks is {describe_value(blocks)} {inside}; it must be a list of modules",
                why="the forward of each module is run again on its own",
                fixes=["recompute(model.blocks)", "recompute([layer])   # one alone"],
            )
        )
    return modules


def _policy(_: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in _KEPT or operator.namespace == _KEPT_NAMESPACE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keep_nothing() -> Contexts:
    """No result is kept but the numbers that the host has read: reading them waits for a device."""
    reads = Reads()
    return reads.recording(), reads.replaying()


def _keep_exchanges() -> Contexts:
    forward, again = create_selective_checkpoint_contexts(_policy)
    record, replay = _keep_nothing()
    return _both(forward, record), _both(again, replay)


@contextmanager
def _both(
    first: AbstractContextManager[Any], second: AbstractContextManager[Any]
) -> Iterator[None]:
    with first, second:
        yield
