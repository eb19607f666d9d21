import pytest
import torch
import torch.distributed as dist
from spmd_types import _mesh_axis
from torch.distributed import _functional_collectives as functional
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import init_device_mesh

from tests.simulate import fake_world, simulated


def test_every_rank_has_its_own_value() -> None:
    with simulated(3) as mode:
        x = mode.rank_map(lambda rank: torch.full((2,), float(rank)))
        assert dist.group.WORLD is not None
        total = functional.all_reduce(x, "sum", dist.group.WORLD)
        assert isinstance(x, LocalTensor)
        assert [x._local_tensors[rank].tolist() for rank in range(3)] == [[0, 0], [1, 1], [2, 2]]
        assert total.tolist() == [3, 3]


def test_fake_world_is_one_rank() -> None:
    with fake_world(4, rank=3):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 4)


def test_nothing_is_left_behind() -> None:
    for world in (2, 4):
        with pytest.raises(RuntimeError, match=r"^user code$"), simulated(world):
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
            _mesh_axis.MeshAxis.of(mesh.get_group())
            assert _mesh_axis._pg_to_mesh_axis
            raise RuntimeError("user code")
        assert not dist.is_initialized()
        assert not _mesh_axis._pg_to_mesh_axis
        assert type(torch.ones(1) + 1) is torch.Tensor
