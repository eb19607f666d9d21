"""Work of each rank on its own numbers: here, or for every rank that one process simulates.

Under torch's LocalTensorMode a LocalTensor holds the tensors of all ranks. What depends on the rank
cannot be said once for all of them, so it goes through these functions, and no other file asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._local_tensor import (
    LocalIntNode,
    LocalTensor,
    LocalTensorMode,
    local_tensor_mode,
)
from torch.distributed._local_tensor._c10d import _prepare_collective_groups


def is_simulating() -> bool:
    return local_tensor_mode() is not None


def is_local_tensor(x: Tensor) -> bool:
    """It holds the tensors of all ranks that this process simulates."""
    return isinstance(x, LocalTensor)


def shapes_by_rank(x: Tensor, group: ProcessGroup) -> list[tuple[int, tuple[int, ...]]]:
    """Of a tensor of many ranks: each one's place in its group, and the shape that it has."""
    place = ranks_in_group(group)
    local = cast(LocalTensor, x)._local_tensors
    return [(place[r], tuple(t.shape)) for r, t in local.items()]


def map_ranks(group: ProcessGroup, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`run(rank in group, *tensors)`: here, or once for every rank that one process simulates."""
    if not isinstance(tensors[0], LocalTensor):
        return run(dist.get_rank(group), *tensors)
    place = ranks_in_group(group)
    return _simulation().rank_map(
        lambda r: run(place[r], *(cast(LocalTensor, t)._local_tensors[r] for t in tensors))
    )


def map_ranks_to_ints(
    group: ProcessGroup, run: Callable[[int, Tensor], list[int]], x: Tensor
) -> list[int]:
    if not isinstance(x, LocalTensor):
        return run(dist.get_rank(group), x)
    place = ranks_in_group(group)
    rows = {r: run(place[r], t) for r, t in x._local_tensors.items()}
    columns = ({r: row[k] for r, row in rows.items()} for k in range(group.size()))
    return [cast(int, torch.SymInt(LocalIntNode(column))) for column in columns]


def max_over_ranks(x: Tensor) -> Tensor:
    """`x`, one number: of all ranks that one process simulates, the largest, and so one for all."""
    if not isinstance(x, LocalTensor):
        return x
    worst = max(x._local_tensors.values(), key=int)
    return _simulation().rank_map(lambda rank: worst)


def _simulation() -> LocalTensorMode:
    mode = local_tensor_mode()
    assert mode is not None, "a LocalTensor outside of its LocalTensorMode"
    return mode


def ranks_in_group(group: ProcessGroup) -> dict[int, int]:
    """Where each simulated rank stands in its own group along the axis that `group` is on."""
    ranks, offsets, _ = _prepare_collective_groups(group)
    return {offset + r: place for offset in offsets for place, r in enumerate(ranks)}
