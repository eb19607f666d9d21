"""What each parameter still owes, read from its declared placement: one row for each.

    name              shape       placement              reduce     norm    stored
    router.weight_ED  [8, 64]     dp:R cp:R tp:I         dp cp      -       Replicate x 3
    experts.w1_eFD    [8, 64, 64] edp:R ep:S(0) etp:S(1) edp        ep etp  Replicate Shard(0) ..

Where a parameter is R its ranks used it for different tokens, so the gradient is a sum over them
that is still to be taken. Where it is I the layer's own backward has taken it. Where it is S each
rank has its own part, which nothing may add to another's; the squares in a norm are added instead.
A loss is divided once, by a global count, so no gradient is divided again: the divisor is 1.

Nothing else in this package knows whether a parameter is "an expert's": reductions, norms, random
streams, FSDP and checkpoints all read these rows.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Literal, final

import torch
from spmd_types import Shard
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as StoredShard
from torch.distributed.tensor.placement_types import Placement as Stored

from spmd_moe.core.declare_placements import declarations
from spmd_moe.core.errors import PlacementError, describe, explain
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import (
    DENSE,
    EXPERT,
    I,
    Kind,
    P,
    Placement,
    R,
    Role,
    RoleKind,
    completed,
)


@final
@dataclass(frozen=True, slots=True)
class Obligation:
    """One parameter or buffer: where it lives, and what follows from that."""

    name: str
    is_buffer: bool
    placement: Placement  # one kind on each axis of its presentation, in the order of the axes
    presentation: Literal["dense", "expert"]
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]  # what this rank computes with
    reduce_axes: tuple[Role, ...]  # its gradient is still to be summed over these
    norm_axes: tuple[Role, ...]  # its squares are to be summed over these
    random_axes: tuple[Role, ...]  # its random stream differs between the ranks of these
    stored: tuple[Stored, ...]  # in checkpoints, on each axis of its presentation
    divisor: int = 1


@final
class Obligations(tuple[Obligation, ...]):
    """The rows of a model, in the order of its parameters; `str` and `repr` give a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = ("name", "global", "local", "placement", "reduce", "div", "norm", "random", "stored")
        rows = [head, *map(_cells, self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)


def obligations(model: nn.Module, mesh: MoEMesh) -> Obligations:
    """List what the gradient of each parameter still owes, read from its declared placement.

    Args:
        model: The model; every parameter and persistent buffer must have a placement.
        mesh: The mesh.

    Returns:
        One row for each parameter and buffer; `print` shows a table.

    Raises:
        PlacementError: A tensor has no placement, two placements, or one that lacks an axis.

    Example:
        >>> from torch import Tensor, nn
        >>> from spmd_moe import CP, DP, TP, I, MoEMesh, Placed, R, declare_placements, obligations
        >>> model = nn.Linear(4, 2, bias=False)
        >>> declare_placements(model, {"weight": Placed[Tensor, DP[R], CP[R], TP[I]]})
        >>> (row,) = obligations(model, MoEMesh.single())
        >>> row.reduce_axes  # each data rank saw different tokens
        (DP, CP)
    """
    check_mesh("obligations", mesh)
    tensors = _tensors(model)
    key = [(name, id(tensor), tensor.shape) for name, tensor in tensors.items()]
    last = _LAST.get(model)
    if last is not None and last[0]() is mesh and last[1] == key:
        return last[2]
    table = _table(model, mesh, tensors)
    _LAST[model] = weakref.ref(mesh), key, table
    return table


# The last table of each model, since every step asks for it. It holds while the tensors are the
# same ones: parallelize and a cast put others in their place.
_LAST: weakref.WeakKeyDictionary[
    nn.Module, tuple[weakref.ref[MoEMesh], list[tuple[str, int, torch.Size]], Obligations]
] = weakref.WeakKeyDictionary()


def _table(model: nn.Module, mesh: MoEMesh, tensors: dict[str, Tensor]) -> Obligations:
    rows: dict[int, Obligation] = {}
    for name, placement in declarations(model).items():
        tensor = tensors[name]
        if placement is None:
            raise _undeclared(name, tensor, model)
        row = _row(name, tensor, placement, mesh)
        first = rows.setdefault(id(tensor), row)
        if first.placement != row.placement:
            raise PlacementError(
                explain(
                    "obligations",
                    f"{first.name!r} and {name!r} are one tensor, declared {first.placement} "
                    f"and {row.placement}",
                    why="a tensor has one placement",
                    fixes=[f"declare both {first.placement}"],
                )
            )
    return Obligations(rows.values())


def trained(model: nn.Module, mesh: MoEMesh) -> list[tuple[Obligation, nn.Parameter]]:
    """The rows of the parameters that have gradients, with the parameters."""
    tensors = _tensors(model)
    pairs = ((row, tensors[row.name]) for row in obligations(model, mesh))
    return [(row, t) for row, t in pairs if isinstance(t, nn.Parameter) and t.requires_grad]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers under every name that they have."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _row(name: str, tensor: Tensor, placement: Placement, mesh: MoEMesh) -> Obligation:
    is_buffer = not isinstance(tensor, nn.Parameter)
    presentation: Literal["dense", "expert"] = (
        "expert" if any(role in placement for role in EXPERT) else "dense"
    )
    roles = EXPERT if presentation == "expert" else DENSE
    kinds = _kinds(name, tensor, placement, roles, is_buffer)
    sharded = {role: k.dim % tensor.ndim for role, k in kinds.items() if isinstance(k, Shard)}
    local, whole = _shapes(tensor, sharded, mesh)
    parts = tuple(sharded)
    return Obligation(
        name=name,
        is_buffer=is_buffer,
        placement=Placement(tuple(role[kind] for role, kind in kinds.items())),
        presentation=presentation,
        global_shape=whole,
        local_shape=local,
        reduce_axes=() if is_buffer else tuple(role for role in roles if kinds[role] is R),
        norm_axes=() if is_buffer else parts,
        random_axes=parts,
        stored=tuple(StoredShard(sharded[r]) if r in sharded else Replicate() for r in roles),
    )


def _shapes(
    tensor: Tensor, sharded: dict[Role, int], mesh: MoEMesh
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What this rank computes with, and the whole. A DTensor of `parallelize` knows the whole."""
    local, whole = list(tensor.shape), list(tensor.shape)
    for role, dim in sharded.items():
        if isinstance(tensor, DTensor):
            local[dim] //= mesh[role].size
        else:
            whole[dim] *= mesh[role].size
    return tuple(local), tuple(whole)


def _kinds(
    name: str, tensor: Tensor, placement: Placement, roles: tuple[Role, ...], is_buffer: bool
) -> dict[Role, Kind]:
    """The kind on each axis, once it is known that there is one, and that it says enough."""
    example = completed(placement, roles)
    for k in placement:
        if k.role not in roles:
            raise _refused(
                name,
                placement,
                f"{k.role!r} is no axis of the mesh that has {roles[0]!r}",
                "a tensor lives on the dense mesh or on the expert mesh",
                example,
            )
        if why := _unusable(k, tensor, is_buffer):
            raise _refused(name, placement, *why, f"{k.role!r}[S[0]]   # parts, joined along dim 0")
    for role in roles:
        if role not in placement:
            raise _refused(
                name,
                placement,
                f"it does not say what the ranks of {role!r} hold",
                "what is not said cannot be reduced, measured or stored",
                example,
            )
    return {role: placement[role] for role in roles}


def _unusable(k: RoleKind, tensor: Tensor, is_buffer: bool) -> tuple[str, str] | None:
    """What is wrong with the kind of a parameter or buffer, and why."""
    if isinstance(k.kind, Shard):
        if -tensor.ndim <= k.kind.dim < tensor.ndim:
            return None
        return f"{k} names a dim that {describe(tensor)} does not have", "it is sharded along a dim"
    if k.kind in (R, I) or (is_buffer and k.kind is P):
        return None
    return f"{k} does not say what the ranks' tensors are together", "a checkpoint is of the whole"


def _refused(name: str, placement: Placement, what: str, why: str, fix: str) -> PlacementError:
    return PlacementError(
        explain("obligations", f"{name!r} is declared {placement}: {what}", why=why, fixes=[fix])
    )


def _undeclared(name: str, tensor: Tensor, model: nn.Module) -> PlacementError:
    prefix, _, own = name.rpartition(".")
    kind = type(model.get_submodule(prefix)).__name__
    placed = "Placed[Tensor, DP[R], CP[R], TP[I]]"
    return PlacementError(
        explain(
            "obligations",
            f"{name!r} {describe(tensor)} of {kind} has no declared placement",
            why="what its gradient still owes is read from there, and nowhere else",
            fixes=[
                f"{own}: {placed}   # in the body of {kind}, if the class is yours",
                f"declare_placements(model, {{{name!r}: {placed}}})   # if it is not",
            ],
        )
    )


def _cells(row: Obligation) -> tuple[str, ...]:
    def roles(some: tuple[Role, ...]) -> str:
        return " ".join(map(str, some)) or "-"

    return (
        row.name,
        str(list(row.global_shape)),
        str(list(row.local_shape)),
        str(row.placement),
        roles(row.reduce_axes),
        "-" if row.is_buffer else str(row.divisor),
        roles(row.norm_axes),
        roles(row.random_axes),
        " ".join("R" if s.is_replicate() else str(s) for s in row.stored),
    )
