"""Comparison of hashes between ranks, with the same verdict on all of them.

The hashes of a whole step are gathered at once along each axis. Before that, the ranks check that
they passed the same boundaries in the same order, so that no rank waits for one that does not take
part.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_moe.core.errors import SanitizerError, explain
from spmd_moe.core.host_values import all_gather_bytes, read_ints
from spmd_moe.core.mesh import Axis, MoEMesh
from spmd_moe.core.placement import DENSE, EXPERT, I, Placement, R, S
from spmd_moe.core.ranks_agree import ranks_by_text
from spmd_moe.core.redistribute import redistribute

ROLES = (*DENSE, *EXPERT)
NONE = 1 << 62  # above any position
_TEXT = 4096  # bytes of an error message that is sent to all ranks


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """One tensor at one point of a step, as a hash."""

    what: str  # "boundary", "state" or "gradient"
    where: str
    name: str
    form: str  # its dtype and shape, which may differ between ranks
    placement: Placement
    line: str
    hash: Tensor

    def declared_same_on(self, axis: Axis) -> bool:
        return same_on(self.placement, axis)


def as_stored(x: Tensor, placement: Placement, mesh: MoEMesh) -> tuple[Tensor, Placement]:
    """The local part of a DTensor, with its kinds on the axes whose ranks all hold that part."""
    stored: Any = x
    if not is_stored_in_parts(x):
        return x, placement
    others: set[int] = set()
    for dim, how in enumerate(stored.placements):
        if not how.is_replicate():
            others |= set(dist.get_process_group_ranks(stored.device_mesh.get_group(dim)))
    others.discard(dist.get_rank())
    kinds = (k for k in placement if others.isdisjoint(_ranks(mesh[k.role])))
    return stored.to_local(), Placement(tuple(kinds))


def is_stored_in_parts(x: Tensor) -> bool:
    """True for a DTensor; its declared placement does not describe its storage."""
    return hasattr(x, "placements")


def _ranks(axis: Axis) -> list[int]:
    return dist.get_process_group_ranks(axis.group) if axis.size > 1 else []


def same_on(placement: Placement, axis: Axis) -> bool:
    """True if the axis has several ranks and all of them must hold the same tensor."""
    return axis.size > 1 and axis.role in placement and placement[axis.role] in (R, I)


def compare(seen: Sequence[Seen], mesh: MoEMesh, step: int, device: torch.device) -> None:
    """Raise on all ranks if a tensor that is declared R or I differs along an axis."""
    _same_way(seen, mesh, step, device)
    gathered = {axis.role: _along(seen, axis) for axis in _axes(mesh)}
    first = torch.full((1,), NONE, device=device)
    for number, role in enumerate(ROLES):
        if role in gathered and gathered[role][0]:
            places, all_hashes = gathered[role]
            differs = (all_hashes != all_hashes.narrow(0, 0, 1)).any(0)
            at = torch.tensor(places, device=device) * len(ROLES) + number
            first = torch.minimum(first, torch.where(differs, at, NONE).min())
    owner, key = first_of(first, mesh)
    if key == NONE:
        return
    text = ""
    if owner == dist.get_rank():
        place, number = divmod(key, len(ROLES))
        axis = mesh[ROLES[number]]
        places, all_hashes = gathered[axis.role]
        held = _by_value(all_hashes.select(1, places.index(place)).tolist(), axis)
        text = _different(seen[place], axis, held, step)
    tell(text, mesh, device)


def _axes(mesh: MoEMesh) -> list[Axis]:
    return [mesh[role] for role in ROLES if mesh[role].size > 1]


def _along(seen: Sequence[Seen], axis: Axis) -> tuple[list[int], Tensor]:
    """Positions of the tensors that must be equal on the axis, and the hashes of all its ranks."""
    places = [i for i, s in enumerate(seen) if s.declared_same_on(axis)]
    if not places:
        return places, torch.empty(0, device="cpu")
    mine = torch.stack([seen[i].hash for i in places]).unsqueeze(0)
    return places, redistribute(mine, axis, src=S(0), dst=R)


def _by_value(values: Sequence[int], axis: Axis) -> list[list[int]]:
    """Groups of ranks that hold equal values."""
    held: dict[int, list[int]] = {}
    for rank, value in zip(dist.get_process_group_ranks(axis.group), values, strict=True):
        held.setdefault(value, []).append(rank)
    return list(held.values())


def _different(seen: Seen, axis: Axis, held: list[list[int]], step: int) -> str:
    kind = seen.placement[axis.role]
    why, fix = _ADVICE[seen.what, "I" if kind is I else "R"]
    return explain(
        seen.where,
        f"{seen.name} {seen.form} is {kind!r} on {axis}, but in step {step} not the same on all: "
        f"ranks {' | '.join(map(str, held))}",
        why=why,
        fixes=[fix],
        at=seen.line,
    )


_SEED = "use the same random seed and the same choices on all of these ranks"
_ALIKE = "update it identically on all of these ranks, from sums over all of them"
_ADVICE = {
    ("boundary", "R"): ("later code relies on R being the same on all ranks", _SEED),
    ("boundary", "I"): ("all ranks compute the same from an I tensor, and must stay equal", _SEED),
    ("state", "R"): ("the ranks were initialized differently, or updated it differently", _ALIKE),
    ("state", "I"): ("the ranks were initialized differently, or updated it differently", _ALIKE),
    ("gradient", "R"): (
        "each rank holds a part of it (P), which must be summed over the axis before the optimizer "
        "uses it, and scaled equally on all ranks",
        "redistribute(p.grad, axis, src=P, dst=R)   # once for each such axis",
    ),
    ("gradient", "I"): (
        "ranks that use a parameter differently hold parts of its gradient, which must be summed",
        "redistribute(p, axis, src=I, dst=R)   # where they use it; its backward sums",
    ),
}


# --- order of boundaries ----------------------------------------------------------------------


def _same_way(seen: Sequence[Seen], mesh: MoEMesh, step: int, device: torch.device) -> None:
    """Raise on all ranks if the boundaries that they passed, or their order, differ."""
    marks = [_mark(s) for s in seen]
    digest = zlib.crc32(repr(marks).encode())
    mine = torch.tensor([[dist.get_rank(), len(marks), digest]], device=device)
    rows = by_rank(gather_all(mine, mesh))
    if all(row[1:] == rows[0][1:] for row in rows):
        return
    longest = max(count for _, count, _ in rows)
    padded = torch.tensor([[dist.get_rank(), *marks, *[0] * (longest - len(marks))]], device=device)
    ways = [way[1:] for way in by_rank(gather_all(padded, mesh))]
    place = next(i for i in range(longest) if len({way[i] for way in ways}) > 1)
    here = seen[place] if place < len(seen) else None
    passed = "nothing more" if here is None else f"{here.where}, {here.name}"
    each = by_text(f"{dist.get_rank()} {passed}", mesh, device)
    text = ""
    if dist.get_rank() == rows[0][0]:
        text = explain(
            "sanitize",
            f"in step {step} the ranks diverge at boundary {place}: {each}",
            why="ranks that issue different collectives wait for each other",
            fixes=["remove conditions on the rank, or on values that differ between ranks"],
            at=here.line if here is not None else None,
        )
    tell(text, mesh, device)


def _mark(seen: Seen) -> int:
    """A number that identifies a boundary; never 0, which stands for none."""
    return zlib.crc32(f"{seen.where} {seen.name} {seen.placement}".encode()) + 1


# --- all ranks --------------------------------------------------------------------------------


def gather_all(rows: Tensor, mesh: MoEMesh) -> Tensor:
    """The rows of all ranks of the mesh."""
    for role in reversed(DENSE):
        rows = redistribute(rows, mesh[role], src=S(0), dst=R)
    return rows


def by_rank(rows: Tensor) -> list[list[int]]:
    """Rows of integers on the host, ordered by their first column."""
    width = rows.shape[1]
    flat = read_ints(rows.flatten())
    return sorted(flat[i : i + width] for i in range(0, len(flat), width))


def first_of(key: Tensor, mesh: MoEMesh) -> tuple[int, int]:
    """The smallest key of all ranks, and the first rank that has it."""
    mine = torch.cat([key.new_tensor([dist.get_rank()]), key]).unsqueeze(0)
    rows = by_rank(gather_all(mine, mesh))
    least = min(value for _, value in rows)
    return next(rank for rank, value in rows if value == least), least


def by_text(text: str, mesh: MoEMesh, device: torch.device) -> str:
    """Each text with the ranks that sent it; a text begins with the number of its rank."""
    said = (line.split(" ", 1) for line in _texts(text, mesh, device))
    return ranks_by_text(sorted((int(rank), rest) for rank, rest in said))


def tell(text: str, mesh: MoEMesh, device: torch.device) -> None:
    """Raise on all ranks the error whose text one of them holds."""
    raise SanitizerError(next(filter(None, _texts(text, mesh, device))))


def _texts(text: str, mesh: MoEMesh, device: torch.device) -> list[str]:
    mine = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
    said = all_gather_bytes(mine, [mesh[role].group for role in reversed(DENSE)], str(device))
    return [row.rstrip(b"\0").decode(errors="replace") for row in said]
