"""Activation checkpointing: a block's forward runs again in backward, and little waits for it."""

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
from spmd_moe.core.host_reads import Reads
from spmd_moe.core.validate import describe_value

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# What is dear to do twice and cheap to keep: whatever waits for other ranks, and the choices, which
# a second computation in another precision might not repeat.
_KEPT_NAMESPACE, _KEPT = "_c10d_functional", (torch.ops.aten.topk.default,)


def recompute(blocks: Iterable[nn.Module], *, exchanges: bool = False) -> None:
    """Let each block compute its forward again in backward, in place of keeping activations.

    By itself what came from other ranks is kept, and the chosen experts, so nothing is sent twice.
    With `exchanges` nothing but the block's inputs is kept. Names, parameters and counters are as
    before; call it before `parallelize`.
    """
    contexts = _keep_nothing if exchanges else _keep_exchanges
    for block in _modules(blocks):
        vars(block)["forward"] = _Again(block.forward, contexts)


@final
class _Again:
    """A forward that is computed again in backward.

    An object that holds the block's own method, not a function around it: `copy.deepcopy` takes a
    function as it is, and the copy of the block would run the block that it was copied from.
    """

    def __init__(self, forward: Callable[..., Any], contexts: Callable[[], Contexts]) -> None:
        update_wrapper(self, forward)
        self._forward, self._contexts = forward, contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            self._forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs
        )


def _modules(blocks: object) -> list[nn.Module]:
    """All of them, before the first is changed."""
    asked = list(blocks) if isinstance(blocks, Iterable) else []
    modules = [block for block in asked if isinstance(block, nn.Module)]
    if len(modules) < len(asked) or not isinstance(blocks, Iterable):
        inside = "with other things in it" if asked else "which is no list"
        raise ConfigError(
            explain(
                "recompute",
                f"blocks is {describe_value(blocks)} {inside}; it must be a list of modules",
                why="each of them is a module whose forward runs again by itself",
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
