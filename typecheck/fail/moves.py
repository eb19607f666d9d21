"""Collectives on the wrong kind, to a kind they do not give, or on an undeclared kind."""

from __future__ import annotations

import spmd_types
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd_moe import DP, EP, TP, I, MoEMesh, P, Placed, R, Role, S, ShardShape, V, redistribute
from spmd_moe.core.collectives import declare_sum, exchange
from spmd_moe.core.mesh import Axis
from spmd_moe.core.placement import GatheredRows, Rows, Tokens, TokenSums, Whole

NORTH = Role("north")
Mine = Placed[Tensor, NORTH[P]]
INSIDE = S(0)


def sources(x: Tokens, w: Whole, sums: TokenSums, mesh: MoEMesh, shape: ShardShape) -> None:
    tp = mesh[TP]
    _ = redistribute(x, tp, src=S(0), dst=R)
    _ = redistribute(x, tp, src=S(0), dst=R, shape=shape)
    _ = redistribute(x, tp, src=INSIDE, dst=R)
    _ = redistribute(sums, mesh[TP], src=P, dst=R)
    _ = redistribute(x, tp, src=P, dst=R)  # E: placement-move
    _ = redistribute(x, tp, src=I, dst=R)  # E: placement-move
    _ = redistribute(x, tp, src=R, dst=S(0))  # E: placement-move
    _ = redistribute(w, tp, src=S(0), dst=R)  # E: placement-move
    _ = redistribute(w, tp, src=I, dst=S(1))  # E: placement-move
    _ = redistribute(sums, tp, src=S(0), dst=R)  # E: placement-move
    _ = redistribute(sums, axis=tp, dst=R, src=R)  # E: placement-move


def no_such_move(x: Tokens, w: Whole, mesh: MoEMesh) -> None:
    _ = redistribute(x, mesh[TP], src=V, dst=R)  # E: placement-move
    _ = redistribute(x, mesh[TP], src=V, dst=P)  # E: placement-move
    _ = redistribute(w, mesh[TP], src=R, dst=V)  # E: placement-move


def other_axes_are_left_alone(sums: TokenSums, mesh: MoEMesh) -> Whole:
    on_tp = redistribute(sums, mesh[TP], src=P, dst=R)
    on_both = redistribute(on_tp, mesh[DP], src=P, dst=R)
    return on_both  # E: placement-return


def a_sum_is_declared(x: Tokens, group: ProcessGroup, mesh: MoEMesh) -> None:
    sums = declare_sum(x, mesh[TP])
    _ = redistribute(sums, mesh[TP], src=P, dst=R)
    _ = redistribute(sums, mesh[DP], src=P, dst=R)  # E: placement-move
    _ = declare_sum(sums, mesh[TP])  # E: placement-move


def by_group(sums: TokenSums, mesh: MoEMesh) -> None:
    _ = redistribute(sums, mesh[TP].group, src=P, dst=I)
    _ = redistribute(sums, mesh[TP].group, src=R, dst=I)  # E: placement-move


def of_spmd_types(x: Tokens, w: Whole, sums: TokenSums, mesh: MoEMesh) -> Whole:
    group = mesh[TP].group
    _ = spmd_types.all_gather(x, group, src=S(0), dst=R) * w
    _ = spmd_types.all_reduce(sums, group, dst=I)
    _ = spmd_types.reduce_scatter(sums, group, dst=S(0)) + 1  # E: placement-operation
    _ = spmd_types.convert(w, group, src=R, dst=S(0)) * x
    _ = spmd_types.all_reduce(x, group, dst=R)  # E: placement-move
    _ = spmd_types.all_reduce(x, group, src=V, dst=R)  # E: placement-move
    _ = spmd_types.all_gather(w, group, dst=R)  # E: placement-move
    _ = spmd_types.all_gather(sums, group, src=S(0), dst=R)  # E: placement-move
    _ = spmd_types.all_to_all(w, group, src=S(0), dst=S(1))  # E: placement-move
    _ = spmd_types.convert(sums, group, src=P, dst=R)  # E: placement-move
    _ = spmd_types.reinterpret(x, group, src=V, dst=R)  # E: placement-move
    return spmd_types.all_gather(x, group, src=S(0), dst=R)  # E: placement-return


def rows_are_exchanged(rows: Rows, gathered: GatheredRows, mesh: MoEMesh) -> Rows:
    _ = exchange(gathered, mesh[EP].group, receives=[1], sends=[1])  # E: placement-move
    return exchange(rows, mesh[EP].group, receives=[1], sends=[1])


def any_axis(x: Tokens, sums: TokenSums, axis: Axis) -> None:
    _ = redistribute(sums, axis, src=P, dst=R)
    _ = redistribute(x, axis, src=P, dst=R)  # E: placement-move


def own_names(x: Mine, mesh: MoEMesh) -> Mine:
    _ = redistribute(x, mesh[NORTH], src=P, dst=R) + 1
    _ = redistribute(x, mesh[NORTH], src=R, dst=P)  # E: placement-move
    return redistribute(x, mesh[NORTH], src=P, dst=S(0))  # E: placement-return
