"""Between what the caller holds and the one type inside the layer: rows of different tokens.

    caller on tp     in                      inside     out
    R or I           every rank has all      V          all rows gathered again
    S[0]             rows of its own         V          the same rows

`[B, L, D]` is flattened to `[T, D]` first and sharded then, so a shard is a run of tokens.
"""

# Shape letters in this file:
#   B  batch    L  length    D  model width    T  tokens inside the layer, on this rank

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from spmd_moe.core.autograd_function import finish
from spmd_moe.core.compute_dtype import sum_dtype
from spmd_moe.core.host_values import read_ints
from spmd_moe.core.mesh import Axis
from spmd_moe.core.placement import CallersTokens, Kind, R, S, Tokens
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape

INSIDE = S(0)


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """What `leave` needs to give the caller his shape back."""

    lead: tuple[int, ...]  # the dims before the last one, as the caller had them
    shape: ShardShape | None  # rows of every rank of tp; None if they are not needed


@final
class Boundary:
    """How the caller holds tokens on tp: `src` when they come, `dst` when they go."""

    def __init__(self, tp: Axis, src: Kind, dst: Kind, *, count_rows: bool) -> None:
        self.tp, self.src, self.dst = tp, src, dst
        # The model around the layer computes the same on every rank of tp.
        self.whole = src != INSIDE
        self.same_rows = self.whole == (dst != INSIDE)
        # Ranks with rows of their own know each other's numbers only by telling.
        self.must_count = tp.size > 1 and src == INSIDE and (dst != INSIDE or count_rows)
        # The layer has collectives on tp, or the model around it has them after each layer.
        self.meets = self.whole or self.must_count

    def enter(self, x: CallersTokens) -> tuple[Tokens, Frame]:
        rows = _rows(x, 1)
        frame = Frame(x.shape[:-1], self._shape(rows))
        return self.own_rows(rows, frame, 1), frame

    def _shape(self, x_TD: CallersTokens) -> ShardShape | None:
        if self.whole:
            return ShardShape.even(x_TD.shape[0], self.tp.size)
        if not self.must_count:
            return None
        rows = torch.ones_like(x_TD.select(1, 0), dtype=torch.int64).sum(0, keepdim=True)
        return ShardShape.ragged(read_ints(redistribute(rows, self.tp, src=S(0), dst=R)))

    def own_rows(self, x: CallersTokens, frame: Frame, dims: int = 0) -> Tokens:
        """This rank's rows of what goes with the caller's tokens; a token's row has `dims` dims."""
        rows = _rows(x, dims)
        own: Tokens = redistribute(rows, self.tp, src=self.src, dst=INSIDE, shape=frame.shape)
        return own

    def leave(self, y_TD: Tokens, frame: Frame) -> CallersTokens:
        y = redistribute(
            y_TD, self.tp, src=INSIDE, dst=self.dst, shape=frame.shape, grad_dtype=sum_dtype(y_TD)
        )
        if self.same_rows and len(frame.lead) > 1:
            y = y.view(*frame.lead, y.shape[-1])
        return finish(y)


def _rows(x: CallersTokens, dims: int) -> CallersTokens:
    # spmd: allow shard - of a sequence that is cut along its length, too, each row is for itself
    return x if x.ndim == dims + 1 else x.flatten(0, -1 - dims)
