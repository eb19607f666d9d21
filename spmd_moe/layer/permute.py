"""Index arithmetic: which row goes where. And rows moved by it, so that backward needs no atomics.

A *slot* is one choice of one token: slot t*K + k is choice k of token t. Slots without an expert
have id -1 and get no row, unless shapes are fixed. The other slots, sorted by expert, are the rows:

    token 0 chose e2 e0        rows by expert   e0: slot 1   e1: slot 2   e2: slot 0, slot 3
    token 1 chose e1 e2        token_N = 0 1 0 1             slot_N = 1 2 0 3

Sorting is stable, so rows of one expert stand in the order of their tokens.
"""

# Shape letters in this file (a small letter is this rank's share of the capital):
#   T  tokens    K  experts per token    D  model width    N  slots that have a row
#   E  experts   e  experts on this rank   S  ranks that send rows here   R  rows received
#   M  bags of rows    B  the rows in all bags

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast, final

import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.core.autograd_function import apply
from spmd_moe.core.compute_dtype import as_dtype, sum_dtype
from spmd_moe.core.host_values import read_ints
from spmd_moe.core.placement import GatheredRows
from spmd_moe.core.spmd_types_compat import rules

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument


@final
@dataclass(frozen=True, slots=True)
class Slots:
    """Where every chosen slot goes when slots are sorted by expert, and where it came from.

    Placed as the ids are that it was made of.
    """

    slot_N: Tensor  # the slot of each row
    token_N: Tensor  # the token of each row
    row_TK: Tensor  # the row of each slot; N where it has none
    every_slot: bool  # every slot has a row


class Gather(NamedTuple):
    """Rows as places in a tensor of tokens: then the tokens are kept, not their K copies."""

    token_R: GatheredRows  # row r is a copy of token `token_R[r]`
    row_TK: GatheredRows  # the rows of each token, R for none: the way back, without atomics


def sort_by_expert(expert_ids_TK: Tensor, every_slot: bool, rows: int | None = None) -> Slots:
    """Rows sorted by expert, no expert first: of every slot, or of those that have an expert.

    `rows` is how many have one; without it, the host reads that from the device.
    """
    if not every_slot and rows is None:
        ids = expert_ids_TK.flatten()
        rows = ids.shape[0] - read_ints((ids < 0).sum(0, keepdim=True))[0]
    return slots_of(by_expert(expert_ids_TK), expert_ids_TK, every_slot, rows)


def by_expert(expert_ids_TK: T) -> T:
    """All slots sorted by expert, those without one first."""
    return cast(T, expert_ids_TK.flatten().argsort(stable=True))


def slots_of(
    sorted_slots: Tensor, expert_ids_TK: Tensor, every_slot: bool, rows: int | None
) -> Slots:
    """The last `rows` slots of those that `by_expert` has sorted, or every slot."""
    slot_N = sorted_slots
    if not every_slot and rows is not None:
        slot_N = slot_N.narrow(0, slot_N.shape[0] - rows, rows)
    count, ids = slot_N.shape[0], expert_ids_TK.flatten()
    row = torch.empty_like(ids) if every_slot else torch.full_like(ids, count)
    row = row.scatter(0, slot_N, torch.arange(count, device=ids.device))
    token_N = torch.floor_divide(slot_N, expert_ids_TK.shape[1])  # `//` is Python around this
    return Slots(slot_N, token_N, row.view_as(expert_ids_TK), every_slot)


def expert_major(counts_Se: GatheredRows, rows: int) -> GatheredRows:
    """The order that takes rows from rank-major to expert-major.

    Rows arrive rank by rank, and from each rank expert by expert: with counts [[2, 1], [1, 1]],
    row 0 1 2 | 3 4 of experts 0 0 1 | 0 1 become 0 1 3 | 2 4.
    """
    sizes = counts_Se.flatten()
    starts_eS = (sizes.cumsum(0) - sizes).view_as(counts_Se).T.flatten()
    sizes_eS = counts_Se.T.flatten()
    shift = starts_eS - (sizes_eS.cumsum(0) - sizes_eS)
    return shift.repeat_interleave(sizes_eS, output_size=rows) + torch.arange(
        rows, device=sizes.device
    )


def inverse(order_R: T) -> T:
    """The permutation that undoes `order_R`."""
    places = torch.arange(order_R.shape[0], device=order_R.device)
    return cast(T, torch.empty_like(order_R).scatter_(0, order_R, places))


# --- rows moved by an index -------------------------------------------------------------------
# Autograd would derive additions at random places, in random order, from an index. Here it is known
# where every row came from, so backward gathers as forward does, and repeats are equal to the bit.


class _Spread(torch.autograd.Function):
    """The row of each slot that has one. Backward is `_Fold`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor, every_slot: bool
    ) -> Tensor:
        ctx.save_for_backward(token_N, row_TK)
        ctx.every_slot = every_slot
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token_N, row_TK = ctx.saved_tensors
        return apply(_Fold, grad, token_N, row_TK, ctx.every_slot), None, None, None

    @staticmethod
    def spmd_typecheck(*, x_TD: Tensor, token_N: Tensor, row_TK: Tensor) -> object:
        rules.ignore(row_TK)
        return _typed(x_TD, token_N)


class _Fold(torch.autograd.Function):
    """The sum of each token's rows, choice by choice. Backward is `_Spread`."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, token_N: Tensor, row_TK: Tensor, every_slot: bool
    ) -> Tensor:
        ctx.save_for_backward(token_N, row_TK)
        ctx.every_slot = every_slot
        return add_rows(x_ND, row_TK, every_slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token_N, row_TK = ctx.saved_tensors
        return apply(_Spread, grad, token_N, row_TK, ctx.every_slot), None, None, None

    @staticmethod
    def spmd_typecheck(*, x_ND: Tensor, row_TK: Tensor, token_N: Tensor) -> object:
        rules.ignore(token_N)
        return _typed(x_ND, row_TK)


class _Take(torch.autograd.Function):
    """Rows by an index. Backward is the same with the index of the way back.

    `ends`: whether each of the two may point past the last row, where it finds zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, back: Tensor, ends: tuple[bool, bool]
    ) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.ends = ends
        return (_with_zeros(x) if ends[0] else x).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, back = ctx.saved_tensors
        return _take(grad, back, index, ctx.ends[::-1]), None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, index: Tensor, back: Tensor) -> object:
        rules.ignore(back)
        return _typed(x, index)


def spread(x_TD: T, slots: Slots) -> T:
    """The rows: each token once for every expert that it chose, sorted by expert."""
    return apply(_Spread, x_TD, slots.token_N, slots.row_TK, slots.every_slot)


def fold(x_ND: T, slots: Slots) -> T:
    """The sum of each token's rows, in the order of its choices."""
    return apply(_Fold, x_ND, slots.token_N, slots.row_TK, slots.every_slot)


def gather_rows(x: Tensor, gather: Gather | None) -> Tensor:
    """The rows of a gather. Without one, x is rows already."""
    if gather is None:
        return x
    return apply(_Spread, x, *gather, _every_slot(gather))


def fold_gathered(x_RD: Tensor, gather: Gather | None) -> Tensor:
    """The sum of the rows that a gather took of each token: what `gather_rows` does in backward."""
    if gather is None:
        return x_RD
    return apply(_Fold, x_RD, *gather, _every_slot(gather))


def _every_slot(gather: Gather) -> bool:
    return gather.token_R.shape[0] == gather.row_TK.numel()


def take_scores(scores_TK: T, slots: Slots) -> T:
    """The weight of each row."""
    return from_slots(cast(T, scores_TK.flatten()), slots)


def from_slots(x: T, slots: Slots) -> T:
    """The rows of those slots that have one, of rows for every slot."""
    return _take(x, slots.slot_N, slots.row_TK.flatten(), (False, not slots.every_slot))


def reorder(x_RD: T, order_R: Tensor, back_R: Tensor) -> T:
    """Rows of `x_RD`, of any kind, in `order_R`, whose inverse is `back_R`."""
    return _take(x_RD, order_R, back_R, (False, False))


def place(x: T, index: Tensor, back: Tensor) -> T:
    """Rows by an index; zeros where it points past the last one. `back` is where each row went,
    past the end for one that went nowhere: the index of backward."""
    return _take(x, index, back, (True, True))


def _take(x: T, index: Tensor, back: Tensor, ends: tuple[bool, bool]) -> T:
    return apply(_Take, x, index, back, ends)


def add_rows(x_ND: Tensor, row_TK: Tensor, every_slot: bool) -> Tensor:
    """The sum of each token's rows, choice by choice: the same bits on every run."""
    if not every_slot:
        x_ND = _with_zeros(x_ND)
    if row_TK.shape[1] == 1:
        return x_ND.index_select(0, row_TK.flatten())
    first_T = torch.arange(0, row_TK.numel(), row_TK.shape[1], device=row_TK.device)
    return sum_bags(x_ND, row_TK.flatten(), first_T, x_ND.dtype)


def sum_bags(x_RD: Tensor, row_B: Tensor, start_M: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the rows of each bag, in their order; bag m begins at `start_M[m]` of `row_B`.

    bfloat16 and float16 are added in float32, and rounded once. On CPUs the operator would round
    halves of bfloat16 away from zero, so there the cast is a step of its own.
    """
    wide_RD = as_dtype(x_RD, sum_dtype(x_RD)) if x_RD.is_cpu else x_RD
    sums_MD = torch.embedding_bag(wide_RD.contiguous(), row_B, start_M, False, 0)[0]  # 0: the sum
    return as_dtype(sums_MD, dtype)


def _with_zeros(x: Tensor) -> Tensor:
    """A row of zeros at the end, for whom nothing else is meant."""
    return fn.pad(x, [0, 0] * (x.ndim - 1) + [0, 1])


def _typed(x: Tensor, index: Tensor) -> object:
    """Rows taken by an index, as a product with a matrix of ones and zeros: linear in the rows."""
    equation = "n...,mk->m..." if index.ndim > 1 else "n...,m->m..."
    return rules.einsum(equation, x, index, linear_in=(0,))
