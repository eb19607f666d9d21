"""Do all ranks say the same? One small exchange at construction, in place of a hang later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed._local_tensor import local_tensor_mode

from spmd_moe.errors import MeshError, explain

_LONGEST_TEXT = 256  # bytes of settings that a rank tells the others; fixed, so that all fit


def agree(
    where: str,
    settings: Mapping[str, object],
    groups: Sequence[ProcessGroup | None],
    device_type: str,
) -> None:
    """Raise on every rank if the ranks called with different settings.

    Gathered along one group after another, so the groups of a mesh reach all of its ranks.
    """
    if local_tensor_mode() is not None:
        return  # all simulated ranks run this very call
    text = " ".join(f"{name}={value}" for name, value in settings.items())
    mine = text.encode()[:_LONGEST_TEXT].ljust(_LONGEST_TEXT)
    rows = torch.tensor([list(mine)], dtype=torch.uint8, device=device_type)
    for group in groups:
        size = dist.get_world_size(group)
        if size > 1:
            parts = [torch.empty_like(rows) for _ in range(size)]
            dist.all_gather(parts, rows, group=group)
            rows = torch.cat(parts)
    said: dict[str, list[int]] = {}
    for rank, row in enumerate(rows.tolist()):
        said.setdefault(bytes(row).decode(errors="replace").strip(), []).append(rank)
    if len(said) > 1:
        each = " | ".join(f"{text} on ranks {ranks}" for text, ranks in said.items())
        raise MeshError(
            explain(
                where,
                f"the ranks were called with different settings: {each}",
                why="ranks that disagree wait for each other for ever",
                fixes=["give every rank the same settings"],
            )
        )
