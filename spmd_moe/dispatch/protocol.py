"""What a dispatcher is. A fused library is a fourth one: a class with these two methods.

    dispatch   tokens on the dense mesh  ->  rows on the expert mesh, sorted by local expert
    collect    the experts' rows  ->  the rows of this rank's slots, in the order of `slots`

`collect` is the exact inverse of `dispatch`: with experts that return what they get, every slot
gets back the row of its token. What a dispatcher has to remember in between is a `State` of its
own, so the state of one does not type-check with another. Expert weights are sharded on ep in
order: rank j of ep has experts j*e to (j+1)*e - 1.

Rows come R on etp, since each rank of etp has a slice of every expert's hidden dim and needs all
rows, and go back P on etp, since each then has a part of the sum over the hidden dim.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    N  slots that have an expert
#   R  rows at this rank's experts       e  experts on this rank

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar, final

from spmd_moe.permute import Gather, Slots
from spmd_moe.placement import GatheredRows, RowSums, Tokens
from spmd_moe.router import Routing

State = TypeVar("State")


@final
@dataclass(frozen=True, slots=True)
class Arrived:
    """The rows at this rank's experts."""

    rows_RD: GatheredRows  # with `gather`: tokens, of which rows are still to be made
    scores_R: GatheredRows | None  # the weight of each row, if experts are to apply it
    counts_e: GatheredRows  # int64, on the device: rows of each expert
    gather: Gather | None = None
    padded: bool = False  # behind the rows of all experts there may be rows of none
    dropped: Tokens | None = None  # int64: how many of this rank's choices found no room


class Dispatcher(Protocol[State]):
    def dispatch(
        self, x_TD: Tokens, scores_TK: Tokens | None, routing: Routing, slots: Slots
    ) -> tuple[Arrived, State]:
        """Rows and, if given, scores of this rank's slots to the ranks that have their experts."""

    def collect(self, y_RD: RowSums, state: State) -> Tokens:
        """The experts' rows back to the slots they came from: [N, D] in the order of `slots`."""
