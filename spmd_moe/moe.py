"""The layer. Its forward is the way of the data; the rest of the file chooses the parts.

enter -> route -> dispatch -> experts -> collect -> combine -> leave
"""

# Shape letters in this file:
#   T  tokens of this rank    D  model width    K  experts per token    E  experts
#   N  slots that have an expert    R  rows at this rank's experts    B  sequences    L  length

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.export import register_dataclass

from spmd_moe.activation import SWIGLU, Activation
from spmd_moe.boundary import INSIDE, Boundary, Frame
from spmd_moe.combine import combine
from spmd_moe.dispatch import AllToAll, Dispatcher, Local
from spmd_moe.errors import ShapeError, describe, explain
from spmd_moe.experts import Experts, Keep, Weigh
from spmd_moe.losses import LossTerms, count_in_backward, declared, loss_terms, reduce_on_tp
from spmd_moe.mesh import MoEMesh
from spmd_moe.permute import sort_by_expert
from spmd_moe.placement import DENSE, EP, ETP, TP, Kind, Tokens, TokenSums
from spmd_moe.router import Router, RouterConfig, Routing
from spmd_moe.shared import ReplicatedShared, ShardedShared


@final
@dataclass(frozen=True, slots=True)
class SharedConfig:
    """An expert for all tokens: its hidden width, whether a gate scales it, how it is placed."""

    hidden: int
    gated: bool = False
    sharded: bool = False


@final
@dataclass(frozen=True, slots=True)
class MoEConfig:
    """What the layer computes, and how the caller holds tokens on tp (`src`, `dst`)."""

    width: int
    hidden: int
    router: RouterConfig
    activation: Activation = SWIGLU
    bias: bool = False
    weigh: Weigh = Weigh.BEFORE_SECOND_MATMUL
    keep: Keep = Keep.ACTIVATIONS
    shared: SharedConfig | None = None
    src: Kind = INSIDE
    dst: Kind = INSIDE
    balance: Literal["batch", "sequence"] | None = None


@final
@dataclass(frozen=True, slots=True)
class MoEOutput:
    """The tokens, the sums that losses are made of, and how this rank's tokens chose."""

    hidden: Tensor  # spmd: allow unknown - placed as the boundary is
    losses: LossTerms | None
    counts_E: TokenSums  # int64; on tp a sum over ranks too, whatever the boundary
    dropped: TokenSums  # int64: choices of no expert, by tokens that are not masked


register_dataclass(MoEOutput)  # as its losses are


@final
class MoE(nn.Module):
    """A Mixture-of-Experts layer on a mesh."""

    def __init__(
        self, config: MoEConfig, mesh: MoEMesh, dispatcher: Dispatcher[Any] | None = None
    ) -> None:
        super().__init__()
        num_experts, shared = config.router.num_experts, config.shared
        self.config, self.mesh = config, mesh
        self.experts = Experts(
            num_experts,
            config.width,
            config.hidden,
            mesh,
            activation=config.activation,
            bias=config.bias,
            keep=config.keep,
        )
        self.router = Router(config.router, config.width, mesh)
        if dispatcher is None:
            alone = mesh[EP].size * mesh[ETP].size == 1
            dispatcher = Local(mesh) if alone else AllToAll(mesh, num_experts)
        self.dispatcher: Dispatcher[Any] = dispatcher
        self.shared: ReplicatedShared | ShardedShared | None = None
        if shared is not None:
            kind = ShardedShared if shared.sharded else ReplicatedShared
            self.shared = kind(config.width, shared.hidden, config.activation, shared.gated, mesh)
        self.boundary = Boundary(
            mesh[TP], config.src, config.dst, count_rows=shared is not None and shared.sharded
        )
        self.weigh_in_combine = config.weigh is Weigh.IN_COMBINE

    def forward(
        self,
        x: Tensor,  # spmd: allow unknown - the caller's; the boundary makes tokens of it
        mask: Tensor | None = None,  # spmd: allow unknown - as x
        expert_ids: Tensor | None = None,  # spmd: allow unknown - as x
    ) -> MoEOutput:
        """`x` is `[B, L, D]` or `[T, D]`. `mask` (True: a token) and `expert_ids` go with it."""
        self._check(x, mask, expert_ids)
        x_TD, frame = self.boundary.enter(x)
        mask_T = None if mask is None else self.boundary.own_rows(mask.flatten(), frame)
        if expert_ids is not None:
            expert_ids = self.boundary.own_rows(expert_ids.flatten(0, -2), frame)
        if mask_T is not None:  # whatever stands in padding must reach neither values nor gradients
            x_TD = x_TD.masked_fill(~mask_T.unsqueeze(1), 0.0)

        routing = self.router(x_TD, mask_T, expert_ids)
        scores_TK = routing.scores_TK
        early_TK, late_TK = (None, scores_TK) if self.weigh_in_combine else (scores_TK, None)
        slots = sort_by_expert(routing.expert_ids_TK, routing.complete)
        arrived, state = self.dispatcher.dispatch(x_TD, early_TK, routing, slots)
        y_RD = self.experts(arrived.rows_RD, arrived.counts_e, arrived.scores_R, arrived.gather)
        rows_ND = self.dispatcher.collect(y_RD, state)
        beside_TD = None if self.shared is None else self.shared(x_TD, frame.shape)  # rows travel
        y_TD = combine(rows_ND, slots, late_TK)
        if beside_TD is not None:
            y_TD = y_TD + beside_TD

        if self.training:
            y_TD = count_in_backward(y_TD, routing.counts_E, self.router.seen_E)
        losses = self._loss_terms(x, frame, routing, mask_T)
        everywhere = [self.mesh[role] for role in DENSE]
        # spmd: allow unknown - which axes is data
        counts_E, dropped = (declared(n, everywhere) for n in (routing.counts_E, routing.dropped))
        return MoEOutput(self.boundary.leave(y_TD, frame), losses, counts_E, dropped)

    # spmd: allow unknown - the caller's
    def _loss_terms(
        self, x: Tensor, frame: Frame, routing: Routing, mask_T: Tokens | None
    ) -> LossTerms | None:
        if self.config.balance is None:
            return None
        group_T, groups = None, 1
        if self.config.balance == "sequence":
            # Counted out of x itself, so that it is on every axis what x is.
            rows = torch.ones_like(x.select(-1, 0), dtype=torch.int64)
            rows_BL = rows.flatten(1) if x.ndim > 2 else rows.unsqueeze(0)
            groups, sequence = rows_BL.shape[0], rows_BL.cumsum(0).flatten() - 1
            group_T = self.boundary.own_rows(sequence, frame)
        terms = loss_terms(routing, self.mesh, group_T, groups, mask_T)
        return reduce_on_tp(terms, self.mesh) if self.boundary.whole else terms

    # spmd: allow unknown - the caller's
    def _check(self, x: Tensor, mask: Tensor | None, expert_ids: Tensor | None) -> None:
        """Refuse what does not fit, before any communication; every rank sees the same."""
        weight, lead = self.router.weight_ED, x.shape[:-1]
        top_k = self.config.router.top_k
        if x.ndim < 2 or x.shape[-1] != self.config.width:
            _refuse(
                f"x {describe(x)} does not end in the layer's width {self.config.width}",
                "x is [B, L, D] or [T, D]",
                f"MoEConfig(width={x.shape[-1]}, ...)",
            )
        if x.device != weight.device:
            _refuse(
                f"x is on {x.device} and the layer on {weight.device}",
                "they meet in a product",
                f"x.to({str(weight.device)!r})",
            )
        if mask is not None and (mask.shape != lead or mask.dtype != torch.bool):
            _refuse(
                f"mask {describe(mask)} does not fit x {describe(x)}",
                "it says True or False of each token",
                f"a bool mask of shape {list(lead)}",
            )
        if expert_ids is not None and (
            expert_ids.shape != (*lead, top_k) or expert_ids.dtype != torch.int64
        ):
            _refuse(
                f"expert_ids {describe(expert_ids)} does not fit x {describe(x)}",
                f"each token has {top_k} ids",
                f"int64 ids of shape {[*lead, top_k]}",
            )
        for name, given in (("mask", mask), ("expert_ids", expert_ids)):
            if given is not None and given.device != x.device:
                _refuse(
                    f"{name} is on {given.device} and x on {x.device}",
                    "they go together",
                    f"{name}.to({str(x.device)!r})",
                )


def _refuse(what: str, why: str, fix: str) -> None:
    raise ShapeError(explain("MoE.forward", what, why=why, fixes=[fix]))
