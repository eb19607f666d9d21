"""All experts are here: sort the rows, and that is all."""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    E  experts
#   N  slots that have an expert    R  rows at this rank's experts

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import EP, ETP, RowSums, Tokens
from spmd_moe.layer.combine import combine
from spmd_moe.layer.dispatch.forecast import Batch, Collective
from spmd_moe.layer.dispatch.protocol import Arrived
from spmd_moe.layer.permute import Gather, Slots, sort_by_expert, take_scores
from spmd_moe.layer.router import Routing
from spmd_moe.layer.routing_faults import AloneCheck


@final
@dataclass(frozen=True, slots=True)
class Sorted:
    """The order of the rows, and the weights that `combine` applies."""

    slots: Slots
    late_TK: Tokens | None


@final
class Local:
    """Dispatcher of a rank that has all experts: no communication, any number of experts.

    Args:
        mesh: The mesh of the layer, with ep 1 and etp 1.

    Raises:
        ConfigError: The mesh shards experts.

    Example:
        >>> from spmd_moe import Local, MoE, MoEConfig, MoEMesh, RouterConfig
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh, Local(mesh))
    """

    num_experts = None
    fixed_shapes = False

    def __init__(self, mesh: MoEMesh) -> None:
        check_mesh("Local", mesh)
        self.axes, self._check = (mesh[EP], mesh[ETP]), AloneCheck()
        for axis in self.axes:
            if axis.size > 1:
                raise ConfigError(
                    explain(
                        "Local",
                        f"the experts are sharded on {axis}",
                        why="Local sends nothing, so every rank needs every expert whole",
                        fixes=["AllToAll(mesh, num_experts)"],
                    )
                )

    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing
    ) -> tuple[Arrived, Sorted]:
        num_experts = routing.counts_E.shape[0]
        self._check.check(routing.fault, routing.logits_TE, num_experts)
        slots = sort_by_expert(routing.expert_ids_TK, routing.complete)
        late_TK = routing.scores_TK if scores_TK is None else None
        scores_R = None if scores_TK is None else take_scores(scores_TK, slots)
        # Nothing is sent, so rows need not be made before the experts read them.
        gather = Gather(slots.token_N, slots.row_TK)
        # spmd: allow argument - etp has size 1 here, where V is R
        return Arrived(x_TD, scores_R, routing.counts_E, gather), Sorted(slots, late_TK)

    def collect(self, y_RD: RowSums, state: Sorted) -> Tokens:
        return y_RD  # spmd: allow return - etp has size 1 here, where P is V

    def combine(self, rows_ND: Tokens, state: Sorted) -> Tokens:
        return combine(rows_ND, state.slots, state.late_TK)

    def forecast(self, batch: Batch) -> tuple[Collective, ...]:
        return ()
