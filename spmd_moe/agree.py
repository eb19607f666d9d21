"""Do all ranks say the same? One small exchange at construction, in place of a hang later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from spmd_types import no_typecheck
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._local_tensor import local_tensor_mode

from spmd_moe.errors import MeshError, explain


def agree(
    where: str,
    settings: Mapping[str, object],
    groups: Sequence[ProcessGroup | None],
    device_type: str,
) -> None:
    """Raise on every rank if the ranks called with different settings.

    A digest is gathered along one group after another, so the groups of a mesh reach all of its
    ranks. Where the digests differ, so do the settings, and these are gathered to be told.
    """
    if local_tensor_mode() is not None:
        return  # all simulated ranks run this very call
    text = "\n".join(f"{name}={value}" for name, value in settings.items()).encode()
    with no_typecheck():
        digests = _gathered(hashlib.sha256(text).digest(), groups, device_type)
        if digests is None or bool((digests == digests[:1]).all()):
            return
        texts = _texts(text, groups, device_type)
    raise MeshError(
        explain(
            where,
            f"the ranks were called with different settings: {_differing(texts)}",
            why="ranks that disagree wait for each other for ever",
            fixes=["give every rank the same settings"],
        )
    )


def _texts(mine: bytes, groups: Sequence[ProcessGroup | None], device_type: str) -> list[bytes]:
    """The whole text of every rank, each padded to the longest on its way."""
    lengths = _gathered(len(mine).to_bytes(8), groups, device_type)
    longest = 0 if lengths is None else max(int.from_bytes(row) for row in lengths.tolist())
    rows = _gathered(mine.ljust(longest, b"\0"), groups, device_type)
    return [] if rows is None else [bytes(row).rstrip(b"\0") for row in rows.tolist()]


def _gathered(
    mine: bytes, groups: Sequence[ProcessGroup | None], device_type: str
) -> Tensor | None:
    """What every rank says, a row for each, in the order of the ranks."""
    rows = torch.tensor([list(mine)], dtype=torch.uint8, device=device_type)
    if type(rows) is not torch.Tensor:
        return None  # a layer without memory (FakeTensorMode) has no values to exchange
    for group in groups:
        size = dist.get_world_size(group)
        if size > 1:
            parts = [torch.empty_like(rows) for _ in range(size)]
            dist.all_gather(parts, rows, group=group)
            rows = torch.cat(parts)
    return rows


def _differing(texts: Sequence[bytes]) -> str:
    """The settings that are not the same on all ranks, with the ranks that have each."""
    lines = [text.decode(errors="replace").split("\n") for text in texts]
    everywhere = set(lines[0]).intersection(*lines[1:])
    said: dict[str, list[int]] = {}
    for rank, own in enumerate(lines):
        text = " ".join(line for line in own if line not in everywhere)
        said.setdefault(text, []).append(rank)
    return " | ".join(f"{text} on ranks {ranks}" for text, ranks in said.items())
