"""Noise on the router's input during training."""

# Shape letters in this file:
#   T  tokens    D  model width

from __future__ import annotations

from typing import final

import torch

from spmd_moe.core.compute_dtype import sum_dtype
from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.host_values import draw_seed
from spmd_moe.core.placement import Tokens
from spmd_moe.core.torch_modes import is_capturing


@final
class Jitter:
    """Scales inputs by 1 -+ amount. Tokens are V on the dense axes, so each rank has its stream.

    Seeds are drawn from torch's default generator, whose state checkpointing restores, so a
    recomputed forward draws the same noise.
    """

    def __init__(self, amount: float, stream: int) -> None:
        self.amount, self.stream = amount, stream

    def __call__(self, x_TD: Tokens) -> Tokens:
        if not self.amount:
            return x_TD
        if is_capturing(x_TD):
            raise _captured()
        seed = draw_seed() + self.stream
        # Not in the dtype of the model: below float32 there are too few numbers near 1.
        noise = torch.empty_like(x_TD, dtype=sum_dtype(x_TD)).uniform_(
            1 - self.amount,
            1 + self.amount,
            generator=torch.Generator(x_TD.device).manual_seed(seed),
        )
        return x_TD * noise


def _captured() -> ConfigError:
    return ConfigError(
        explain(
            "Router",
            "jitter is drawn while a CUDA graph is captured",
            why="a replay would repeat the same noise, from a generator the graph does not know",
            fixes=["layer.eval()   # no noise", "jitter=0.0   # of RouterConfig"],
        )
    )
