"""The device of a rank: set before the first tensor is on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from spmd_moe import MeshError, MoEMesh
from spmd_moe.check.mirror_world import mirror_world
from spmd_moe.core import mesh as mesh_file
from spmd_moe.core import ranks_agree
from spmd_moe.core.host_values import all_gather_bytes
from tests.support.workers import run


def test_init_sets_the_device_of_the_rank_before_a_tensor_is_on_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tensor on "cuda" starts CUDA on device 0, and torch then leaves the device as it is."""
    real: Any = torch.tensor
    happened: list[str] = []

    def tensor(*given: Any, device: Any = None, **settings: Any) -> Any:
        if device == "cuda":
            happened.append("tensor")
            device = "cpu"
        return real(*given, device=device, **settings)

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(happened))
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: happened.append(f"device {n}"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with mirror_world(8, rank=3):
        mesh = MoEMesh.init("cuda", dp=8, ep=8)
    assert happened == ["device 3", "tensor"] and mesh.dense.device_type == "cuda"


# --- GPUs that are not there, too few, or of two kinds ------------------------------------------


def pretend_gpus(
    patch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)
) -> None:
    """As many GPUs on this machine, for ranks that are gloo processes or threads."""
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_90"])
    patch.setattr(mesh_file, "init_device_mesh", lambda *_, **__: None)
    patch.setattr(
        ranks_agree,
        "all_gather_bytes",
        lambda mine, groups, device: all_gather_bytes(mine, groups, "cpu"),
    )


def refused_on(count: int, here: int, capabilities: tuple[tuple[int, int], ...]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        pretend_gpus(patch, count, capabilities[dist.get_rank()])
        patch.setenv("LOCAL_WORLD_SIZE", str(here))
        with pytest.raises(MeshError) as raised:
            MoEMesh.init("cuda", dp=2)
        return str(raised.value)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("count", "here", "capabilities", "said"),
    [
        (0, 2, ((9, 0), (9, 0)), "device_type is 'cuda', and torch sees no GPU"),
        (1, 2, ((9, 0), (9, 0)), "this machine has 2 ranks and 1 GPU"),
        (2, 2, ((9, 0), (8, 0)), r"gpu_capability=9.0 on ranks [0] | gpu_capability=8.0 on ranks"),
        (2, 2, ((7, 0), (7, 0)), "capability 7.0, and this torch is built for 7.5 and later"),
    ],
)
def test_gpus_that_do_not_serve_are_refused_alike_on_all_ranks(
    count: int, here: int, capabilities: tuple[tuple[int, int], ...], said: str
) -> None:
    errors = run(2, refused_on, count, here, capabilities)
    assert errors[0] == errors[1] and said in errors[0].partition("\n")[0]
