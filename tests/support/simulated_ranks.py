"""Many ranks in one process: a fake process group, with or without LocalTensorMode.

with simulated(4) as mode:                      # every rank at once, real values
    x = mode.rank_map(lambda rank: torch.full((2,), rank))

with fake_world(4, rank=3):                     # one rank; collectives return made-up values
    mesh = MoEMesh.init("cpu", ep=4)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from spmd_types import _mesh_axis
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(world: int, rank: int = 0) -> Iterator[None]:
    """Be rank `rank` of `world` ranks that do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        leave_world()


@contextmanager
def simulated(world: int) -> Iterator[LocalTensorMode]:
    """Be all `world` ranks at once: one LocalTensor holds what each of them holds."""
    with fake_world(world), LocalTensorMode(world) as mode:
        yield mode


def leave_world() -> None:
    """Destroy the process groups, if any, and what spmd_types and DTensor remember about them.

    spmd_types keys axis names by process group. A name left behind would be handed to the next
    test's group, and its error messages would depend on the order of the tests. DTensor keeps the
    meshes of earlier results, and hands one of dead groups to the next test if the ranks are equal.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    _mesh_axis._reset()
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
