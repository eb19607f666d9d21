"""The protocol of dispatchers. A fused library is one more: a class with these members.

    num_experts, axes, fixed_shapes    what it was made for
    dispatch   tokens on the dense mesh  ->  rows on the expert mesh, sorted by local expert
    collect    the experts' rows  ->  the rows of this rank's tokens
    combine    these rows  ->  the weighted sum of each token's rows
    forecast   the collectives of all, and of their backward, for given numbers of rows

`collect` is the inverse of `dispatch`: with experts that return what they get, each row of a token
comes back, or where rows are added before they are sent back, the sum of such rows. It is apart
from `combine` because shared experts run while the rows are on their way back. What a dispatcher
has to remember in between is a `State` of its own, so the state of one does not type-check with
another. Expert weights are sharded on ep in order: rank j of ep has experts j*e to (j+1)*e - 1.

Rows come R on etp, since each rank of etp has a slice of every expert's hidden dim and needs all
rows, and go back P on etp, since each then has a part of the sum over the hidden dim.

A call is where a tensor changes its presentation: V on dp, cp and tp is V on edp, ep and etp. So
there are methods that stand only for their signature.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    N  rows of this rank's tokens
#   R  rows at this rank's experts       e  experts on this rank

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, final, runtime_checkable

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import Axis, MoEMesh, check_mesh
from spmd_moe.core.placement import EP, GatheredRows, RowSums, Tokens
from spmd_moe.core.validate import check_positive_ints, describe_value, split_evenly
from spmd_moe.layer.dispatch.forecast import Batch, Collective
from spmd_moe.layer.permute import Gather
from spmd_moe.layer.router import Routing

State = TypeVar("State")

_MEMBERS = ("num_experts", "axes", "fixed_shapes", "dispatch", "collect", "combine", "forecast")


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


@runtime_checkable
class Dispatcher(Protocol[State]):
    """Sends rows to the ranks that have their experts, and back.

    If the input of one rank is refused, all ranks that wait for it must raise. So a dispatcher
    sends `routing.fault`, one number, together with the counts, and passes the numbers of all ranks
    to `check_marks` before it sends rows. A rank whose input was refused takes part up to that
    point, with zero tokens.

    Attributes:
        num_experts: The number of experts it was made for; None if it serves any number.
        axes: The axes ep and etp it was made on, in any order.
        fixed_shapes: True if the host reads no size.

    Example:
        >>> from spmd_moe import AllToAll, Dispatcher, MoEMesh
        >>> dispatcher: Dispatcher = AllToAll(MoEMesh.single(), num_experts=4)
    """

    @property
    def num_experts(self) -> int | None: ...

    @property
    def axes(self) -> Sequence[Axis]: ...

    @property
    def fixed_shapes(self) -> bool: ...

    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing, /
    ) -> tuple[Arrived, State]:
        """Rows of this rank's tokens, and their scores, to the ranks that have their experts.

        `scores_TK` is None where the experts do not apply them. The rows are then multiplied by
        `routing.scores_TK` after the experts, before any of them are added.
        """

    def collect(self, y_RD: RowSums, state: State, /) -> Tokens:
        """The experts' rows back to the tokens they came from, in an order of its own."""

    def combine(self, rows_ND: Tokens, state: State, /) -> Tokens:
        """The sum of each token's rows: [T, D]. Zeros for a token without any."""

    def forecast(self, batch: Batch, /) -> Iterable[Collective] | None:
        """The collectives of these and of their backward on this rank, in order.

        Forward first. None if that is not known: `spmd-moe plan` then says so, and leaves them out.
        """


def experts_of_a_rank(where: str, mesh: MoEMesh, num_experts: int, **settings: object) -> int:
    """How many experts each rank of ep has. Refuses what no dispatcher can be built of."""
    check_mesh(where, mesh)
    # Checked first, so that every rank reports a fault of one rank.
    mesh.check_ranks_agree(where, {"num_experts": num_experts, **settings})
    check_positive_ints(where, num_experts=num_experts)
    return split_evenly(where, "num_experts", num_experts, mesh[EP])


def settings_of_dispatcher(dispatcher: object) -> dict[str, object]:
    """What all ranks must agree on."""
    made_for = dispatcher.num_experts if isinstance(dispatcher, Dispatcher) else None
    return {"dispatcher": type(dispatcher).__name__, "dispatcher.num_experts": made_for}


def check_dispatcher(dispatcher: object, num_experts: int, mesh: MoEMesh) -> None:
    """An object with all members of the protocol, made for these experts and this mesh."""
    new = f"AllToAll(mesh, num_experts={num_experts})"
    if isinstance(dispatcher, type) or not isinstance(dispatcher, Dispatcher):
        raise ConfigError(
            explain(
                "MoE",
                f"dispatcher is {describe_value(dispatcher)}; it must be an object with "
                f"{', '.join(_MEMBERS[:-1])} and {_MEMBERS[-1]}",
                why="the layer asks it for these, as spmd_moe.Dispatcher declares them",
                fixes=[f"dispatcher={new}"],
            )
        )
    theirs = dispatcher.num_experts
    if theirs not in (None, num_experts):
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
    for axis in dispatcher.axes:
        if axis.size != mesh[axis.role].size:
            raise ConfigError(
                explain(
                    "MoE",
                    f"the dispatcher is built on {axis}, the layer on {mesh[axis.role]}",
                    why="both must have the same share of the experts",
                    fixes=[f"dispatcher={new}   # the mesh of the layer"],
                )
            )
