"""What a dispatcher is. A fused library is a fourth one: a class with these two methods.

    dispatch   tokens on the dense mesh  ->  rows on the expert mesh, sorted by local expert
    collect    the experts' rows  ->  the rows of this rank's slots, in the order of `slots`

`collect` is the exact inverse of `dispatch`: with experts that return what they get, every slot
gets back the row of its token. What a dispatcher has to remember in between is a `State` of its
own, so the state of one does not type-check with another. Expert weights are sharded on ep in
order: rank j of ep has experts j*e to (j+1)*e - 1.

Rows come R on etp, since each rank of etp has a slice of every expert's hidden dim and needs all
rows, and go back P on etp, since each then has a part of the sum over the hidden dim.

A call is where a tensor changes its presentation: V on dp, cp and tp is V on edp, ep and etp. So
there are methods that stand only for their signature.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    N  slots that have an expert
#   R  rows at this rank's experts       e  experts on this rank

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar, final

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import EP, GatheredRows, RowSums, Tokens
from spmd_moe.core.validate import check_positive_ints, describe_value, split_evenly
from spmd_moe.layer.permute import Gather, Slots
from spmd_moe.layer.router import Routing

State = TypeVar("State")


@final
@dataclass(frozen=True, slots=True)
class Arrived:
    """The rows at this rank's experts."""

    rows_RD: GatheredRows  # with `gather`: tokens, of which rows are still to be made
    scores_R: GatheredRows | None  # the weight of each row, if experts are to apply it
    counts_e: GatheredRows  # int64, on the device: rows of each expert
    gather: Gather | None = None
    # Behind the rows of all experts there may be rows of none. They may be anything, and come back
    # as zeros; as zeros `collect` has to bring their gradients, too.
    padded: bool = False
    dropped: Tokens | None = None  # int64: how many of this rank's choices found no room


class Dispatcher(Protocol[State]):
    """Protocol of a dispatcher: sends rows to the ranks of their experts, and back.

    The layer also reads these attributes if they exist: `num_experts`, `axes` (ep and etp), and
    `fixed_shapes` (the host reads no size, so every slot has a row, also one without an expert).

    An error on one rank must end the call on all ranks that wait for it: `routing.fault` travels
    with the counts, and the numbers of all ranks go to `check_marks` before any row is sent. A rank
    whose input was refused calls with no tokens, and only up to there.

    Example:
        >>> from spmd_moe import AllToAll, Dispatcher, MoEMesh
        >>> dispatcher: Dispatcher = AllToAll(MoEMesh.single(), num_experts=4)
    """

    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing, slots: Slots
    ) -> tuple[Arrived, State]:
        """Rows of this rank's slots, and their scores, to the ranks that have their experts.

        `scores_TK` is None where `combine` weighs; those of `routing` are not for here.
        """

    def collect(self, y_RD: RowSums, state: State) -> Tokens:
        """The experts' rows back to the slots they came from: [N, D] in the order of `slots`."""


def experts_of_a_rank(where: str, mesh: MoEMesh, num_experts: int, **settings: object) -> int:
    """How many experts each rank of ep has. Refuses what no dispatcher can be built of."""
    check_mesh(where, mesh)
    # First of all, so that what is wrong on one rank is told on every rank.
    mesh.check_ranks_agree(where, {"num_experts": num_experts, **settings})
    check_positive_ints(where, num_experts=num_experts)
    return split_evenly(where, "num_experts", num_experts, mesh[EP])


def check_dispatcher(dispatcher: object, num_experts: int, mesh: MoEMesh) -> None:
    """Two methods, and, where it says `num_experts` and `axes` (of ep and etp), the layer's own."""
    new = f"AllToAll(mesh, num_experts={num_experts})"
    methods = (getattr(dispatcher, name, None) for name in ("dispatch", "collect"))
    if isinstance(dispatcher, type) or not all(map(callable, methods)):
        raise ConfigError(
            explain(
                "MoE",
                f"dispatcher is {describe_value(dispatcher)}; "
                "it must be an object that can dispatch and collect",
                why="a dispatcher knows the mesh and the experts of one layer",
                fixes=[f"dispatcher={new}"],
            )
        )
    theirs = getattr(dispatcher, "num_experts", num_experts)
    if theirs != num_experts:
        raise ConfigError(
            explain(
                "MoE",
                f"the dispatcher is built for {theirs} experts, the router chooses among "
                f"{num_experts}",
                why="rows would go to ranks that do not have their expert",
                fixes=[
                    f"num_experts={num_experts}   # of {type(dispatcher).__name__}",
                    f"num_experts={theirs}   # of RouterConfig",
                ],
            )
        )
    for axis in getattr(dispatcher, "axes", ()):
        if axis.size != mesh[axis.role].size:
            raise ConfigError(
                explain(
                    "MoE",
                    f"the dispatcher is built on {axis}, the layer on {mesh[axis.role]}",
                    why="both must have the same share of the experts",
                    fixes=[f"dispatcher={new}   # the mesh of the layer"],
                )
            )
