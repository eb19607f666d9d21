"""The layer. Its forward is the way of the data; the rest of the file chooses the parts.

enter -> route -> dispatch -> experts -> collect -> combine -> leave
"""

# Shape letters in this file:
#   T  tokens of this rank    D  model width    K  experts per token    E  experts
#   N  rows of this rank's tokens    R  rows at this rank's experts    B  sequences    L  length
#   e  experts on this rank    F  hidden width of an expert, on this rank

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol, final

import torch
from torch import nn

from spmd_moe.core.autograd_function import no_rows
from spmd_moe.core.compute_dtype import as_dtype
from spmd_moe.core.errors import ConfigError, SpmdMoeError, explain
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.per_rank_work import is_simulating
from spmd_moe.core.placement import DENSE, TP, CallersTokens, Tokens
from spmd_moe.core.validate import check_instance, settings_of
from spmd_moe.layer.balance_losses import (
    LossTerms,
    declare_sums,
    loss_terms,
    reduce_on_tp,
)
from spmd_moe.layer.boundary import Boundary, Frame
from spmd_moe.layer.check_inputs import Beside, check_inputs
from spmd_moe.layer.choose_matmul import check_matmul
from spmd_moe.layer.dispatch import Dispatcher
from spmd_moe.layer.dispatch.default_dispatcher import default_dispatcher
from spmd_moe.layer.dispatch.protocol import check_dispatcher, settings_of_dispatcher
from spmd_moe.layer.experts import Experts
from spmd_moe.layer.grouped_matmul import GroupedMatmul
from spmd_moe.layer.moe_config import MoEConfig, ScoreApplication
from spmd_moe.layer.moe_output import MoEOutput
from spmd_moe.layer.router import Router, Routing
from spmd_moe.layer.router_logits import mask_rows
from spmd_moe.layer.selection_bias import count_in_backward
from spmd_moe.layer.shared_experts import ReplicatedShared, ShardedShared


class _Call(Protocol):
    def __call__(
        self,
        x: CallersTokens,
        mask: CallersTokens | None = None,
        expert_ids: CallersTokens | None = None,
        *,
        expert_weights: CallersTokens | None = None,
        router_input: CallersTokens | None = None,
    ) -> MoEOutput: ...


@final
class MoE(nn.Module):
    """A Mixture-of-Experts layer on a mesh.

    Every rank of the mesh builds it with the same arguments; different ones raise on all ranks.
    Weights are NaN until `init_weights` or a checkpoint sets them. All ranks of the ep and etp
    groups call the layer together, each with its own tokens, which may be none.

    Args:
        config: The settings.
        mesh: The mesh.
        dispatcher: How rows travel. Default: `Local` if a rank has all experts; `DedupAllToAll` if,
            with all experts equally likely, it sends at most 3/4 of the rows; else `AllToAll`.
        matmul: The grouped matmul of the experts. Default: chosen by dtype and device.

    Raises:
        ConfigError: Settings do not fit the mesh or the dispatcher.
        MeshError: Ranks pass different arguments.
        RoutingError: In forward, scores are not finite, ids are out of range, or another rank
            refused its input.

    Example:
        >>> import torch
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> x = torch.ones(3, 8)
        >>> tuple((x + layer(x).hidden).shape)
        (3, 8)
    """

    __call__: _Call  # the call of a module, which torch types as Any, is that of its forward

    def __init__(
        self,
        config: MoEConfig,
        mesh: MoEMesh,
        dispatcher: Dispatcher[Any] | None = None,
        *,
        matmul: GroupedMatmul | None = None,
    ) -> None:
        super().__init__()
        check_instance(
            "MoE", "config", config, MoEConfig, "MoEConfig(dim=64, hidden_dim=128, router=...)"
        )
        check_mesh("MoE", mesh)
        parts = settings_of_dispatcher(dispatcher) | {"matmul": type(matmul).__name__}
        mesh.check_ranks_agree("MoE", settings_of(config) | parts)
        check_matmul("MoE", matmul)
        num_experts, shared = config.router.num_experts, config.shared
        self.config, self.mesh = config, mesh
        self.data_axes = [mesh[role] for role in DENSE if mesh[role].size > 1]
        self.experts = Experts(
            num_experts,
            config.dim,
            config.hidden_dim,
            mesh,
            activation=config.activation,
            bias=config.bias,
            recompute=config.recompute,
            matmul=matmul,
            weigh_input=config.score_application is ScoreApplication.ON_INPUT,
        )
        if dispatcher is None:
            dispatcher = default_dispatcher(mesh, num_experts, config.router.top_k)
        check_dispatcher(dispatcher, num_experts, mesh)
        self.dispatcher: Dispatcher[Any] = dispatcher
        self.shared: ReplicatedShared | ShardedShared | None = None
        if shared is not None:
            kind = ShardedShared if shared.sharded else ReplicatedShared
            activation = shared.activation or config.activation
            self.shared = kind(config.dim, shared.hidden_dim, activation, shared.gated, mesh)
        self.boundary = Boundary(
            mesh[TP], config.src, config.dst, count_rows=shared is not None and shared.sharded
        )
        self.weigh_in_combine = config.score_application is ScoreApplication.IN_COMBINE
        self.fixed = dispatcher.fixed_shapes
        # Where ranks of tp do not meet, none waits; where the host reads nothing, none can raise.
        roles = mesh.tell_axes if self.boundary.meets and not self.fixed else ()
        tell = [mesh[role] for role in roles if mesh[role].size > 1]
        self.router = Router(config.router, config.dim, mesh, tell=tell)
        if self.fixed and self.boundary.must_count:
            name = type(dispatcher).__name__
            raise ConfigError(
                explain(
                    "MoE",
                    f"{name}, and tokens that are S(0) on {mesh[TP]} and are gathered there",
                    why="such ranks tell each other their numbers of rows, and the host reads them",
                    fixes=["src=R   # the layer then shares the rows out, evenly"],
                )
            )

    def extra_repr(self) -> str:
        config, by = self.config, type(self.dispatcher).__name__
        sizes = f"{config.dim} to {config.hidden_dim}, {config.activation}"
        choices = f"{config.router.num_experts} experts, {config.router.top_k} for each token"
        return f"{sizes}, {choices}, {config.src} to {config.dst} on tp, {by} on {self.mesh}"

    def forward(
        self,
        x: CallersTokens,
        mask: CallersTokens | None = None,
        expert_ids: CallersTokens | None = None,
        *,
        expert_weights: CallersTokens | None = None,
        router_input: CallersTokens | None = None,
    ) -> MoEOutput:
        """`x` is `[B, L, D]` or `[T, D]`. `mask` (True: a token) and the others go with it."""
        beside = Beside(mask, expert_ids, expert_weights, router_input)
        try:
            check_inputs(x, beside, self.config.dim, self.router, self.experts)
        except SpmdMoeError:
            self._tell_refused(x)
            raise
        x_TD, frame = self.boundary.enter(x)
        mask_T = None if mask is None else self.boundary.own_rows(mask, frame)
        routing = self._route(x_TD, mask_T, beside, frame)
        early_TK = None if self.weigh_in_combine else routing.scores_TK
        arrived, state = self.dispatcher.dispatch(x_TD, early_TK, routing)
        y_RD = self.experts(
            arrived.rows_RD, arrived.counts_e, arrived.scores_R, arrived.gather, arrived.padded
        )
        rows_ND = self.dispatcher.collect(y_RD, state)
        beside_TD = None
        if self.shared is not None:  # now, while rows are on their way back
            beside_TD = self.shared(mask_rows(x_TD, mask_T), frame.shape)
        y_TD = self.dispatcher.combine(rows_ND, state)
        if beside_TD is not None:  # masked again: an activation of 0 need not be 0
            y_TD = mask_rows(y_TD + beside_TD, mask_T)
        chosen_E = routing.counts_E
        if routing.identity is not None:
            chosen_E, weights_T = routing.identity.counts_E, routing.identity.weights_T
            own_TD = mask_rows(x_TD, mask_T) * weights_T.unsqueeze(1)
            y_TD = y_TD + as_dtype(own_TD, y_TD.dtype)

        if self.training:
            y_TD = count_in_backward(y_TD, chosen_E, self.router.seen_E)
        losses = self._loss_terms(x, frame, routing, mask_T)
        lost = routing.dropped
        if arrived.dropped is not None:
            lost = lost + arrived.dropped
        # spmd: allow unknown - which axes is data
        counts_E, dropped = (declare_sums(n, self.data_axes) for n in (chosen_E, lost))
        return MoEOutput(self.boundary.leave(y_TD, frame), losses, counts_E, dropped)

    @torch.no_grad()
    def _tell_refused(self, x: CallersTokens) -> None:
        """Take part with no tokens, up to where all who would wait raise a `RoutingError`."""
        if self.fixed or is_simulating():
            return  # no rank reads marks there; in a simulation this call is that of all ranks
        with suppress(Exception):  # what the caller has to hear is why his input is refused
            dim = self.config.dim
            x_0D, _ = self.boundary.enter(no_rows(x, self.experts.w1_eFD, dim))
            seen_0D = x_0D.view(0, self.config.router.input_dim or dim)
            routing = self.router(seen_0D, refused=True)
            early_0K = None if self.weigh_in_combine else routing.scores_TK
            self.dispatcher.dispatch(x_0D, early_0K, routing)

    def _route(self, x_TD: Tokens, mask_T: Tokens | None, beside: Beside, frame: Frame) -> Routing:
        """Route this rank's tokens, with what else the caller gives of them."""
        _, ids, weights, router_input = beside
        own = self.boundary.own_rows
        seen_TD = x_TD if router_input is None else own(router_input, frame, 1)
        ids_TK = None if ids is None else own(ids, frame, 1)
        weights_TK = None if weights is None else own(weights, frame, 1)
        routing: Routing = self.router(seen_TD, mask_T, ids_TK, weights_TK)
        return routing

    def _loss_terms(
        self, x: CallersTokens, frame: Frame, routing: Routing, mask_T: Tokens | None
    ) -> LossTerms | None:
        if self.config.balance is None:
            return None
        group_T, groups = None, 1
        if self.config.balance == "sequence":
            # Counted out of x itself, so that it is on every axis what x is.
            rows = torch.ones_like(x.select(-1, 0), dtype=torch.int64)
            rows_BL = rows if x.ndim > 2 else rows.unsqueeze(0)
            groups, sequence_BL = rows_BL.shape[0], rows_BL.cumsum(0) - 1
            group_T = self.boundary.own_rows(sequence_BL, frame)
        terms = loss_terms(routing, self.mesh, group_T, groups, mask_T)
        return reduce_on_tp(terms, self.mesh) if self.boundary.whole else terms
