"""The feed-forward network of all experts, forward and backward, with little kept in between.

    h = activation(x @ w1.T + b1, x @ w3.T + b3)        y = (score * h) @ w2.T

Kept for backward are the arguments, and `gate` and `up`, the results of the first matmuls; never
`h`, `score * h` or `y`. The bias of the last matmul is added elsewhere: of the ranks that share an
expert only one may add it.
"""

# Shape letters in this file:
#   T  tokens on this rank     R  rows at this rank's experts, sorted by expert
#   K  experts per token       e  experts on this rank
#   D  model width             F  hidden width of an expert, on this rank     A  any width

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar, cast

import torch
from spmd_types import register_local_autograd_function
from torch import Tensor

from spmd_moe.core.compute_dtype import as_dtype, no_autocast
from spmd_moe.core.errors import GradientError, explain
from spmd_moe.core.placement import (
    ExpertHiddenBias,
    ExpertInWeight,
    ExpertOutWeight,
    GatheredRows,
    Rows,
)
from spmd_moe.core.torch_modes import is_vmapped
from spmd_moe.layer.activations import Activation
from spmd_moe.layer.grouped_matmul import GroupedMatmul, LoopedMatmul, RowGroups
from spmd_moe.layer.permute import Gather, fold_gathered, gather_rows
from spmd_moe.layer.scaled_rows import scaled

T = TypeVar("T", bound=Tensor)  # the result has the kind of the argument
U = TypeVar("U", bound=Tensor)


class Weights(NamedTuple):
    """The weights of the experts: w3 is there if the activation has a gate, b1 and b3 by choice."""

    w1_eFD: ExpertInWeight
    w2_eDF: ExpertOutWeight
    w3_eFD: ExpertInWeight | None = None
    b1_eF: ExpertHiddenBias | None = None
    b3_eF: ExpertHiddenBias | None = None

    def or_cast(
        self,
        w1_eFD: ExpertInWeight | None,
        w2_eDF: ExpertOutWeight | None,
        w3_eFD: ExpertInWeight | None,
    ) -> Weights:
        """Replace matrices by those that forward has cast."""
        return self._replace(
            w1_eFD=self.w1_eFD if w1_eFD is None else w1_eFD,
            w2_eDF=self.w2_eDF if w2_eDF is None else w2_eDF,
            w3_eFD=self.w3_eFD if w3_eFD is None else w3_eFD,
        )

    def to(self, dtype: torch.dtype) -> Weights:
        """The matrices in `dtype`."""
        w3_eFD = None if self.w3_eFD is None else as_dtype(self.w3_eFD, dtype)
        w1_eFD, w2_eDF = as_dtype(self.w1_eFD, dtype), as_dtype(self.w2_eDF, dtype)
        return self._replace(w1_eFD=w1_eFD, w2_eDF=w2_eDF, w3_eFD=w3_eFD)


class Recipe(NamedTuple):
    """How to compute."""

    activation: Activation
    matmul: GroupedMatmul
    compute: torch.dtype
    """What rows and weights are cast to for the matmuls."""
    recompute: bool
    """Backward computes the first matmuls again."""
    padded: bool
    """Behind the rows of all experts there may be rows of none."""

    def cast(self, w: Weights) -> Weights:
        """The weights for the matmuls. A loop casts the weights of one expert at a time."""
        return w if isinstance(self.matmul, LoopedMatmul) else w.to(self.compute)


class Call(NamedTuple):
    """The arguments. With `gather`, `x` is tokens, and row r is token `token_R[r]`."""

    counts_e: GatheredRows
    gather: Gather | None
    x: GatheredRows
    scores_R: GatheredRows | None
    w: Weights


class Hidden(NamedTuple):
    """The results of the first matmuls; `up` is None when the activation has no gate."""

    gate_RF: Rows
    up_RF: Rows | None

    def to(self, dtype: torch.dtype) -> Hidden:
        up_RF = None if self.up_RF is None else as_dtype(self.up_RF, dtype)
        return Hidden(as_dtype(self.gate_RF, dtype), up_RF)


class Made(NamedTuple):
    """Results of forward: the output, and tensors that it may save for backward."""

    y_RD: Rows
    hidden: Hidden  # the results of the first matmuls
    w: Weights  # as the matmuls took them
    groups: RowGroups

    def cast_only(self, own: Weights) -> list[Tensor | None]:
        """The matrices that were cast. Backward reuses them, because a cast reads all weights."""
        pairs = zip(self.w[:3], own[:3], strict=True)
        return [None if cast is given else cast for cast, given in pairs]


class Needs(NamedTuple):
    """Which gradients are needed, in the order in which `_GroupedFFN` takes their tensors."""

    x: bool
    scores: bool
    w1: bool
    w2: bool
    w3: bool
    b1: bool
    b3: bool


def grouped_ffn(recipe: Recipe, call: Call) -> Rows:
    """`y_RD`, zero in rows of no expert."""
    inputs = (call.x, call.scores_R, *call.w)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        token_R, row_TK = call.gather or (None, None)
        y_RD: Rows = _GroupedFFN.apply(recipe, call.counts_e, token_R, row_TK, *inputs)  # type: ignore[no-untyped-call]  # torch
        return y_RD
    with torch.no_grad():
        return _GroupedFFN.outputs(recipe, call).y_RD


@register_local_autograd_function
class _GroupedFFN(torch.autograd.Function):
    """One node for the whole network, so that it decides what is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        counts_e: Tensor,
        token_R: Tensor | None,
        row_TK: Tensor | None,
        x: Tensor,
        scores_R: Tensor | None,
        *weights: Any,
    ) -> Tensor:
        call = Call(counts_e, _gather(token_R, row_TK), x, scores_R, Weights(*weights))
        made = _GroupedFFN.outputs(recipe, call)
        # In the narrower of the two dtypes.
        dtype = min(recipe.compute, x.dtype, key=lambda dtype: dtype.itemsize)
        kept = [None] * 5 if recipe.recompute else [*made.hidden.to(dtype), *made.cast_only(call.w)]
        ctx.recipe = recipe
        inputs = counts_e, token_R, row_TK, x, scores_R, *weights
        ctx.save_for_backward(*inputs, made.groups.read_e, *kept)
        return made.y_RD

    @staticmethod
    def outputs(recipe: Recipe, call: Call) -> Made:
        with no_autocast(call.x):
            groups = RowGroups.of(recipe.matmul, call.counts_e)
            x_RD = gather_rows(as_dtype(call.x, recipe.compute), call.gather)
            w = recipe.cast(call.w)
            hidden = _GroupedFFN.hidden(groups, x_RD, w)
            h_RF = _scaled(recipe.activation.forward(*hidden), call.scores_R)
            y_RD: Rows = as_dtype(groups.linear(h_RF, w.w2_eDF), call.x.dtype)
            y_RD = groups.zero_past_the_end(y_RD) if recipe.padded else y_RD
            return Made(y_RD, hidden, w, groups)

    @staticmethod
    def hidden(groups: RowGroups, x_RD: Tensor, w: Weights) -> Hidden:
        """The results of the first matmuls."""
        gate_RF = groups.linear(x_RD, w.w1_eFD, w.b1_eF)
        up_RF = None if w.w3_eFD is None else groups.linear(x_RD, w.w3_eFD, w.b3_eF)
        return Hidden(gate_RF, up_RF)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        counts_e, token_R, row_TK, x, scores_R, *saved = ctx.saved_tensors
        weights, (read_e, gate_RF, up_RF, *cast) = saved[:5], saved[5:]
        call = Call(counts_e, _gather(token_R, row_TK), x, scores_R, Weights(*weights))
        _refuse_batched(dy_RD)
        # With create_graph=True autograd follows the lines below, to differentiate them again. It
        # has not seen how gate and up were computed, so they are computed again.
        kept = None if gate_RF is None or torch.is_grad_enabled() else Hidden(gate_RF, up_RF)
        w = call.w if torch.is_grad_enabled() else call.w.or_cast(*cast)
        groups = RowGroups.of(ctx.recipe.matmul, counts_e, read_e)
        needs = Needs(*ctx.needs_input_grad[4:])
        given = ctx.recipe, call, ctx.recipe.cast(w), groups, kept, dy_RD, needs
        return None, None, None, None, *_GroupedFFN.gradients(*given)

    @staticmethod
    def gradients(
        recipe: Recipe,
        call: Call,
        w: Weights,
        groups: RowGroups,
        kept: Hidden | None,
        dy_RD: Tensor,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        """The gradients in the order of `Needs`, None where they are not needed."""
        activation, compute = recipe.activation, recipe.compute
        _, gather, x, scores_R, own = call
        dtype = own.w1_eFD.dtype
        with no_autocast(x):
            x_RD = gather_rows(as_dtype(x, compute), gather)
            dy_RD = as_dtype(dy_RD.contiguous(), compute)
            hidden = kept.to(compute) if kept is not None else _GroupedFFN.hidden(groups, x_RD, w)
            h_RF = activation.forward(*hidden)

            dw2 = groups.outer(dy_RD, _scaled(h_RF, scores_R), dtype) if needs.w2 else None
            dh_RF = groups.rows(dy_RD, w.w2_eDF)
            ds_R = None
            if scores_R is not None and needs.scores:
                ds_R = _dot(dh_RF, h_RF, scores_R.dtype)
            dgate_RF, dup_RF = activation.backward(_scaled(dh_RF, scores_R), *hidden)

            dw1 = groups.outer(dgate_RF, x_RD, dtype) if needs.w1 else None
            db1 = groups.total(dgate_RF, dtype) if needs.b1 else None
            dx_RD = groups.rows(dgate_RF, w.w1_eFD) if needs.x else None
            dw3 = db3 = None
            if dup_RF is not None and w.w3_eFD is not None:
                dw3 = groups.outer(dup_RF, x_RD, dtype) if needs.w3 else None
                db3 = groups.total(dup_RF, dtype) if needs.b3 else None
                dx_RD = None if dx_RD is None else dx_RD.add_(groups.rows(dup_RF, w.w3_eFD))

            if recipe.padded:
                dx_RD = None if dx_RD is None else groups.zero_past_the_end(dx_RD)
                ds_R = None if ds_R is None else groups.zero_past_the_end(ds_R)
            dx = None if dx_RD is None else as_dtype(fold_gathered(dx_RD, gather), x.dtype)
        return dx, ds_R, dw1, dw2, dw3, db1, db3


def _refuse_batched(dy_RD: T) -> None:
    """Raise for a backward of several gradients at once; the operators take those of one."""
    if is_vmapped(dy_RD):
        raise GradientError(
            explain(
                "Experts",
                "backward is under torch.vmap (vectorize=True, or is_grads_batched=True)",
                why="the experts' backward takes the gradient of one output at a time",
                fixes=[
                    "torch.autograd.functional.jacobian(f, x)   # without vectorize=True",
                    "[torch.autograd.grad(y, x, v, retain_graph=True) for v in vectors]",
                ],
            )
        )


def _gather(token_R: T | None, row_TK: U | None) -> Gather | None:
    return None if token_R is None or row_TK is None else Gather(token_R, row_TK)


def _scaled(x_RA: T, scores_R: U | None) -> T:
    return x_RA if scores_R is None else scaled(x_RA, scores_R)


def _dot(a_RA: T, b_RA: T, dtype: torch.dtype) -> T:
    """The scalar product of the rows, a sum in the wider dtype."""
    sums_R = (a_RA * b_RA).sum(1, dtype=torch.promote_types(a_RA.dtype, dtype))
    return cast(T, as_dtype(sums_R, dtype))
