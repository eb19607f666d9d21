"""Swapped models of transformers as targets of `spmd-moe check` and `plan`; and broken ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

import spmd_moe.hf as hf
from spmd_moe import CP, DP, TP, I, MoEMesh, Placed, R, S, V, declare_placements
from spmd_moe.check import Case
from spmd_moe.check.target import Target
from tests.hf.models import VOCABULARY, model_of

WHOLE_ON_TP = Placed[Tensor, DP[V], CP[V], TP[I]]


def ids(tokens: int) -> Tensor:
    return torch.arange(tokens).remainder(VOCABULARY - 1).add(1).unsqueeze(0)


def small(name: str) -> Any:
    """A whole model of as many layers as it has kinds of layers."""
    return model_of(name, num_hidden_layers=2 if name == "deepseek_v3" else 1)


def swapped(name: str, change: Callable[[Any], object] = lambda model: None) -> Target:
    """A whole model, attention included; `change` breaks it, before its blocks are swapped."""

    def target(mesh: MoEMesh, tokens: int) -> Case:
        model = small(name)
        change(model)
        return Case(hf.swap(model, mesh), (ids(tokens),), (WHOLE_ON_TP,))

    return target


@final
class WithLoss(nn.Module):
    """The losses of a model, the auxiliary one among them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        out = self.model(
            input_ids, labels=input_ids, num_items_in_batch=100, output_router_logits=True
        )
        loss: Tensor = out.loss
        return loss


def with_loss(mesh: MoEMesh, tokens: int) -> Case:
    model = WithLoss(hf.swap(small("qwen3_moe"), mesh))
    return Case(model, (ids(tokens),), (WHOLE_ON_TP,))


# --- broken -------------------------------------------------------------------------------------


def _never_summed(model: nn.Module) -> None:
    """The gradient of a norm, declared as if the ranks of dp had the same tokens."""
    declare_placements(model, {"model.norm.weight": Placed[Tensor, DP[I], CP[R], TP[I]]})


@final
class _HalfOfHeads(nn.Module):
    """The last product of an attention, cut over tp, and not all-reduced."""

    weight_DH: Placed[Tensor, DP[R], CP[R], TP[S[1]]]

    def __init__(self, whole: nn.Linear, mesh: MoEMesh) -> None:
        super().__init__()
        self.at, self.of = mesh[TP].rank, mesh[TP].size
        self.weight_DH = nn.Parameter(whole.weight.detach().tensor_split(self.of, 1)[self.at])

    def forward(self, x_TH: Tensor) -> Tensor:
        own = x_TH.tensor_split(self.of, -1)[self.at]
        return nn.functional.linear(own, self.weight_DH)


never_summed = swapped("qwen3_moe", _never_summed)


def rows_of_their_own(mesh: MoEMesh, tokens: int) -> Case:
    """The ranks of tp get tokens of their own, and gradients are not summed over tp."""
    model = hf.swap(small("qwen3_moe"), mesh)
    return Case(model, (ids(tokens),), (Placed[Tensor, DP[V], CP[V], TP[V]],))


def not_reduced(mesh: MoEMesh, tokens: int) -> Case:
    model = small("qwen3_moe")
    attention = model.model.layers[0].self_attn
    attention.o_proj = _HalfOfHeads(attention.o_proj, mesh)
    return Case(hf.swap(model, mesh), (ids(tokens),), (WHOLE_ON_TP,))


def table_undeclared(mesh: MoEMesh, tokens: int) -> Case:
    """The rotary table has lost its declaration."""
    model = hf.swap(small("qwen3_moe"), mesh)
    vars(model.model.rotary_emb)["_declared_placements"].clear()
    return Case(model, (ids(tokens),), (WHOLE_ON_TP,))


def qwen3_moe(mesh: MoEMesh, tokens: int) -> Case:
    """Two layers, of which a plan has the collectives in order."""
    return Case(hf.swap(model_of("qwen3_moe"), mesh), (ids(tokens),), (WHOLE_ON_TP,))
