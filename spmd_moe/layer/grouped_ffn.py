"""The experts' feed-forward network, forward and backward, with little kept in between.

    h = activation(x @ w1.T + b1, x @ w3.T + b3)        y = (score * h) @ w2.T

A bias of the last matmul is not in here: of the ranks that share an expert only one may add it.

The mathematics stands here once, for a block of rows: those of a few experts at a time in
`per_expert.py`, all at once, with a grouped matmul, in `experts.py`.

Kept for backward: what was handed in, and `gate` and `up`. Never `y`, `h`, or `score * h`.
"""

# Shape letters in this file:
#   R  rows at this rank's experts, sorted by expert     e  experts on this rank
#   D  model width     F  hidden width of an expert     A, B  any width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spmd_moe.core.dtypes import as_dtype
from spmd_moe.layer.activations import Activation
from spmd_moe.layer.grouped_matmul import Block


class Weights(NamedTuple):
    """The weights of the experts: w3 is there if the activation has a gate, b1 and b3 by choice."""

    w1_eFD: Tensor
    w2_eDF: Tensor
    w3_eFD: Tensor | None = None
    b1_eF: Tensor | None = None
    b3_eF: Tensor | None = None


class Call(NamedTuple):
    """What the experts, or some of them, are given to compute."""

    x_RD: Tensor
    scores_R: Tensor | None
    w: Weights
    activation: Activation

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient, in the order of `Gradients`."""
        return self.x_RD, self.scores_R, *self.w

    def cast(self, dtype: torch.dtype) -> Call:
        """The same with rows and weights in that dtype; scores keep theirs."""
        w1, w2, *others = self.w
        cast = [None if t is None else as_dtype(t, dtype) for t in others]
        w = Weights(as_dtype(w1, dtype), as_dtype(w2, dtype), *cast)
        return self._replace(x_RD=as_dtype(self.x_RD, dtype), w=w)


class Needs(NamedTuple):
    """Which gradients somebody asked for, in the order of `Gradients`."""

    x: bool
    scores: bool
    w1: bool
    w2: bool
    w3: bool
    b1: bool
    b3: bool


class Gradients(NamedTuple):
    """The gradients of a call, or room for them; None where nobody asks."""

    x_RD: Tensor | None = None
    scores_R: Tensor | None = None
    w1_eFD: Tensor | None = None
    w2_eDF: Tensor | None = None
    w3_eFD: Tensor | None = None
    b1_eF: Tensor | None = None
    b3_eF: Tensor | None = None


NO_ROOM = Gradients()


class Hidden(NamedTuple):
    """What the first matmuls gave; `up` is None when the activation has no gate."""

    gate_RF: Tensor
    up_RF: Tensor | None


def hidden(block: Block, call: Call, room: Hidden | None = None) -> Hidden:
    """The first matmul, or both. In `room`, if that is given and suits the block."""
    w, (gate_room, up_room) = call.w, room or (None, None)
    gate_RF = _linear(block, call.x_RD, w.w1_eFD, w.b1_eF, gate_room)
    if not call.activation.gated:
        return Hidden(gate_RF, None)
    assert w.w3_eFD is not None
    return Hidden(gate_RF, _linear(block, call.x_RD, w.w3_eFD, w.b3_eF, up_room))


def output(block: Block, call: Call, hid: Hidden, room_RD: Tensor | None = None) -> Tensor:
    """`y_RD`, from what the first matmuls gave; in `room`, as above."""
    h_RF = _scaled(call.activation.forward(*hid), call.scores_R)
    return block.linear(h_RF, call.w.w2_eDF, room_RD)


def gradients(
    block: Block, call: Call, hid: Hidden, dy_RD: Tensor, needs: Needs, room: Gradients = NO_ROOM
) -> Gradients:
    """What is needed; gradients of weights are written into `room`, where there is some."""
    x_RD, scores_R, w, activation = call
    h_RF = activation.forward(*hid)
    dh_RF = block.rows(dy_RD, w.w2_eDF)
    dw2 = block.outer(dy_RD, _scaled(h_RF, scores_R), room.w2_eDF) if needs.w2 else None
    ds_R = None
    if needs.scores and scores_R is not None:
        ds_R = _dot(dh_RF, h_RF, scores_R)
    dgate_RF, dup_RF = activation.backward(_scaled(dh_RF, scores_R), *hid)
    dw1 = block.outer(dgate_RF, x_RD, room.w1_eFD) if needs.w1 else None
    db1 = block.total(dgate_RF, room.b1_eF) if needs.b1 else None
    dx_RD = block.rows(dgate_RF, w.w1_eFD) if needs.x else None
    dw3 = db3 = None
    if dup_RF is not None:
        assert w.w3_eFD is not None
        dw3 = block.outer(dup_RF, x_RD, room.w3_eFD) if needs.w3 else None
        db3 = block.total(dup_RF, room.b3_eF) if needs.b3 else None
        dx_RD = block.rows(dup_RF, w.w3_eFD, onto=dx_RD) if needs.x else None
    return Gradients(dx_RD, ds_R, dw1, dw2, dw3, db1, db3)


def _linear(
    block: Block, x_RA: Tensor, w_eBA: Tensor, b_eB: Tensor | None, room_RB: Tensor | None
) -> Tensor:
    y_RB = block.linear(x_RA, w_eBA, room_RB)
    return y_RB if b_eB is None else block.plus(y_RB, b_eB)


def _scaled(x_RA: Tensor, scores_R: Tensor | None) -> Tensor:
    if scores_R is None:
        return x_RA
    # Scores are often wider than the rows: the product is rounded, not the score.
    return as_dtype(x_RA * scores_R.unsqueeze(1), x_RA.dtype)


def _dot(a_RA: Tensor, b_RA: Tensor, scores_R: Tensor) -> Tensor:
    return (a_RA * b_RA).sum(1, dtype=torch.promote_types(a_RA.dtype, scores_R.dtype))
