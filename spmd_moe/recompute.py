"""Activation checkpointing: a block's forward runs again in backward, and little waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# What is dear to do twice and cheap to keep: whatever waits for other ranks, and the choices, which
# a second computation in another precision might not repeat.
_KEPT_NAMESPACE, _KEPT = "_c10d_functional", (torch.ops.aten.topk.default,)


def recompute(blocks: Iterable[nn.Module], *, exchanges: bool = False) -> None:
    """Let each block compute its forward again in backward, in place of keeping activations.

    By itself what came from other ranks is kept, and the chosen experts, so nothing is sent twice.
    With `exchanges` nothing but the block's inputs is kept. Names, parameters and counters are as
    before; call it before `parallelize`.
    """
    contexts = {} if exchanges else {"context_fn": _keep_exchanges}
    for block in blocks:
        forward = block.forward
        vars(block)["forward"] = _again(forward, contexts)


def _again(forward: Callable[..., Any], contexts: dict[str, Any]) -> Callable[..., Any]:
    @wraps(forward)
    def twice(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return twice


def _policy(_: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in _KEPT or operator.namespace == _KEPT_NAMESPACE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_keep_exchanges = partial(create_selective_checkpoint_contexts, _policy)
