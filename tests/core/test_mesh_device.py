"""The device of a rank: set before the first tensor is on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spmd_moe import MoEMesh
from spmd_moe.check.mirror_world import mirror_world


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
