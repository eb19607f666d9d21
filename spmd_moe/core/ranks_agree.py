"""Do all ranks say the same? One small exchange at construction, in place of a hang later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from spmd_moe.core.errors import MeshError, explain
from spmd_moe.core.host_values import all_gather_bytes
from spmd_moe.core.per_rank_work import is_simulating

_LONG = 120  # letters of a setting that a message has room for


def check_ranks_agree(
    where: str,
    settings: Mapping[str, object],
    groups: Sequence[ProcessGroup | None],
    device_type: str,
) -> None:
    """Raise on every rank if the ranks called with different settings.

    Digests are exchanged first. Where they differ, so do the settings, which are then told.
    """
    if is_simulating():
        return  # all simulated ranks run this very call
    text = "\n".join(map(_line, settings.items())).encode()
    digests = all_gather_bytes(hashlib.sha256(text).digest(), groups, device_type)
    if len(set(digests)) == 1:
        return
    texts = _texts(text, groups, device_type)
    ranks = _numbers(dist.get_rank(), groups, device_type)
    raise MeshError(
        explain(
            where,
            f"the ranks were called with different settings: {_differing(ranks, texts)}",
            why="ranks that disagree would wait for each other without end",
            fixes=["give every rank the same settings"],
        )
    )


def _line(setting: tuple[str, object]) -> str:
    """A setting in one line. Of much, the beginning and what tells it from others."""
    name, value = setting
    text = f"{name}={value}".replace("\n", "; ")
    if len(text) <= _LONG:
        return text
    return f"{text[:_LONG]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _texts(mine: bytes, groups: Sequence[ProcessGroup | None], device_type: str) -> list[bytes]:
    """The whole text of every rank, each padded to the longest on its way."""
    padded = mine.ljust(max(_numbers(len(mine), groups, device_type)), b"\0")
    return [row.rstrip(b"\0") for row in all_gather_bytes(padded, groups, device_type)]


def _numbers(mine: int, groups: Sequence[ProcessGroup | None], device_type: str) -> list[int]:
    return [int.from_bytes(row) for row in all_gather_bytes(mine.to_bytes(8), groups, device_type)]


def _differing(ranks: Sequence[int], texts: Sequence[bytes]) -> str:
    """The settings that are not the same on all ranks, with the ranks that have each."""
    lines = [text.decode(errors="replace").split("\n") for text in texts]
    everywhere = set(lines[0]).intersection(*lines[1:])
    own = (" ".join(line for line in each if line not in everywhere) for each in lines)
    return ranks_by_text(sorted(zip(ranks, own, strict=True)))


def ranks_by_text(said: Iterable[tuple[int, str]]) -> str:
    """Each text once, with the ranks that say it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in said:
        ranks.setdefault(text, []).append(rank)
    return " | ".join(f"{text} on ranks {who}" for text, who in ranks.items())
