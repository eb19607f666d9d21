"""Placements that cannot be: the caret stands below what is wrong."""

from __future__ import annotations

from torch import Tensor, nn

from spmd_moe import DP, TP, MoEMesh, P, Placed, R, Role, S, V, redistribute

mesh = MoEMesh.single()
NORTH = Role("north")
DATA = Role("dp")
number = 3

good: Placed[Tensor, DP[V], TP[S[-1]], NORTH[P]]
optional: Placed[Tensor | None, TP[R]]
weight: Placed[nn.Parameter, TP[R]]
no_kinds: Placed[Tensor]
no_tensor: Placed[int, TP[V]]  # E: placement-annotation
nothing: Placed  # E: placement-annotation
twice: Placed[Tensor, TP[V], DP[R], TP[R]]  # E: placement-annotation
bare_role: Placed[Tensor, TP]  # E: placement-annotation
no_role: Placed[Tensor, number[V]]  # E: placement-annotation
a_function: Placed[Tensor, print[V]]  # E: placement-annotation
a_mesh: Placed[Tensor, mesh[V]]  # E: placement-annotation
a_number: Placed[Tensor, 3]  # E: placement-annotation
no_kind: Placed[Tensor, TP[DP]]  # E: placement-annotation
two_kinds: Placed[Tensor, TP[V, R]]  # E: placement-annotation
no_dim: Placed[Tensor, TP[S]]  # E: placement-annotation
named_dim: Placed[Tensor, TP[S[tokens]]]  # E: placement-annotation
half_a_dim: Placed[Tensor, TP[S[number]]]  # E: placement-annotation
kind_of_kind: Placed[Tensor, TP[V[0]]]  # E: placement-annotation
quoted_kind: Placed[Tensor, TP["V"]]  # E: placement-annotation
quoted_shard: Placed[Tensor, TP["S[0]"]]  # E: placement-annotation
quoted_dim: Placed[Tensor, TP[S["0"]]]  # E: placement-annotation
quoted_role: Placed[Tensor, "TP[V]"]  # E: placement-annotation
quoted_tensor: "Placed['Tensor', TP[V]]"
unknown: Placed[Tensor, TPP[V]]  # E: name-defined
unknown_kind: Placed[Tensor, TP[Q]]  # E: name-defined
Alias = Placed[Tensor, TP[V], TP[V]]  # E: placement-annotation


def signature(x: Placed[str, TP[V]]) -> Placed[None, TP[V]]:  # E: placement-annotation
    print(x)


# Other names of roles are those roles.
EAST = TP
NORTH_AGAIN, COLUMNS = NORTH, EAST
HIDDEN: Role = TP
other_name: Placed[Tensor, EAST[V], TP[V]]  # E: placement-annotation
name_of_a_name: Placed[Tensor, DP[V], COLUMNS[V], TP[V]]  # E: placement-annotation
of_own_role: Placed[Tensor, NORTH[V], NORTH_AGAIN[R]]  # E: placement-annotation
same_text: Placed[Tensor, DATA[V], DP[V]]  # E: placement-annotation
hidden: Placed[Tensor, HIDDEN[V]]  # E: placement-annotation


def other_names(x: Placed[Tensor, EAST[P]], mesh: MoEMesh) -> Placed[Tensor, TP[R]]:
    y: Placed[Tensor, TP[V]] = x  # E: placement-assignment
    print(y)
    return redistribute(x, mesh[COLUMNS], src=P, dst=R)
