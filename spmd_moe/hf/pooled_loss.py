"""The auxiliary loss of transformers, pooled over all layers, for the tokens of all ranks.

transformers computes it from the logits of one process. A product of two means over all tokens is
not a mean of products, so a rank needs the counts of all: one all-reduce of E + 1 numbers.
"""

# Shape letters in this file:
#   T  tokens of this rank    E  experts    K  experts per token

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import Axis, MoEMesh
from spmd_moe.core.placement import CP, DP, TP, S
from spmd_moe.layer.balance_losses import declare_sums, sum_over
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.router import count_choices

MESH = "_spmd_moe_hf_mesh"  # in the model's own dict, so that copies have it too


def pooled_loss(
    logits: Sequence[Tensor], top_k: int, axes: Sequence[Axis], mask_T: Tensor | None
) -> Tensor:
    """This rank's part: summed over `axes` it is the loss of one process with all tokens."""
    each = [_sums(logits_TE, top_k, mask_T) for logits_TE in logits]
    counts_E, prob_sums_E, rows = (torch.stack(sums).sum(0) for sums in zip(*each, strict=True))
    totals = declare_sums(torch.cat([counts_E, rows.unsqueeze(0)]), axes)
    num_experts = counts_E.shape[0]
    all_counts_E, all_rows = sum_over(totals, axes).to(torch.float32).split([num_experts, 1])
    used_E = num_experts * all_counts_E / all_rows / all_rows
    loss: Tensor = (used_E * declare_sums(prob_sums_E, axes)).sum()
    return loss


def _sums(logits_TE: Tensor, top_k: int, mask_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of one layer: choices of each expert, its probabilities, and tokens."""
    probs_TE = logits_TE.softmax(1)
    ids_TK = probs_TE.topk(top_k, dim=1).indices
    real_T = torch.ones_like(ids_TK.select(1, 0))
    if mask_T is not None:
        real_T = real_T * mask_T
        ids_TK = ids_TK.masked_fill(mask_T.unsqueeze(1) == 0, -1)
    prob_sums_E = (probs_TE.float() * real_T.unsqueeze(1)).sum(0)
    return count_choices(ids_TK, logits_TE.shape[1]), prob_sums_E, real_T.sum()


def with_pooled_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a transformers model, with this rank's share of the auxiliary loss."""

    parameters = signature(forward)

    @wraps(forward)
    def forward_on_ranks(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        axes = _token_axes(self)
        if all(axis.size == 1 for axis in axes):
            return out
        if isinstance(out, tuple):
            refuse_tuple(self, kwargs)
            return out
        if not isinstance(getattr(out, "aux_loss", None), Tensor):
            return out
        given = parameters.bind_partial(self, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        top_k = _first_layer(self).config.router.top_k
        part = pooled_loss(
            out.router_logits, top_k, axes, None if mask is None else mask.flatten().long()
        )
        if out.loss is not None:
            own = out.loss - _coefficient(self) * out.aux_loss
            out.loss = declare_sums(own, axes) + _coefficient(self) * part
        out.aux_loss = part
        return out

    return forward_on_ranks


def _token_axes(model: nn.Module) -> list[Axis]:
    """Axes whose ranks have different tokens."""
    mesh = vars(model)[MESH]
    assert isinstance(mesh, MoEMesh)
    roles = [DP, CP, *([TP] if _first_layer(model).config.src == S(0) else [])]
    return [mesh[role] for role in roles]


def _first_layer(model: nn.Module) -> MoE:
    return next(module for module in model.modules() if isinstance(module, MoE))


def _coefficient(model: Any) -> float:
    found = getattr(model, "router_aux_loss_coef", None)
    return float(model.config.get_text_config().router_aux_loss_coef if found is None else found)


def refuse_tuple(model: Any, given: dict[str, Any]) -> None:
    """Refuse an output in which the auxiliary loss cannot be found, if it was asked for."""
    of_config = getattr(getattr(model, "config", None), "output_router_logits", False)
    if given.get("output_router_logits", of_config):
        raise ConfigError(
            explain(
                f"{type(model).__name__}.forward",
                "output_router_logits is True, and return_dict is False",
                why="the auxiliary loss of one rank must be replaced, and in a tuple it "
                "has no name",
                fixes=["return_dict=True"],
            )
        )
