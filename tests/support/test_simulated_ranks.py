import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spmd_types import _mesh_axis
from torch.distributed import _functional_collectives as functional
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import init_device_mesh

from tests.support.simulated_ranks import fake_world, simulated

ROOT = Path(__file__).resolve().parents[2]


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


UNWAITED = """
import tests
import torch
import torch.distributed._functional_collectives as funcol
from tests.support.simulated_ranks import fake_world
with fake_world(2):
    left = funcol.all_reduce(torch.ones(2), "sum", torch.distributed.group.WORLD)
"""


@pytest.mark.parametrize(("level", "quiet"), [("", True), ("WARNING", False)])
def test_nothing_is_printed_after_the_summary(level: str, quiet: bool) -> None:
    """C++ would warn of collectives without a wait as the process ends."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CPP_LOG_LEVEL"}
    environment |= {"TORCH_CPP_LOG_LEVEL": level} if level else {}
    words = [sys.executable, "-W", "ignore", "-c", UNWAITED]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (done.stderr == "") is quiet, done.stderr
