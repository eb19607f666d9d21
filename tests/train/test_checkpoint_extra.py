"""What a checkpoint keeps beside tensors: it comes back as it was, and is the same on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spmd_moe import (
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    SpmdMoeError,
    load_checkpoint,
    save_checkpoint,
)
from spmd_moe.check.thread_ranks import threaded

LONG = "x" * 199  # more than a message has room for


def made(mesh: MoEMesh) -> MoE:
    return MoE(MoEConfig(4, 8, RouterConfig(2, 1)), mesh)


def refusal(folder: str, extra: list[dict[str, Any]]) -> str:
    mesh = MoEMesh.init("cpu", dp=2)
    try:
        save_checkpoint(f"{folder}/1", made(mesh), mesh, extra=extra[dist.get_rank()])
    except SpmdMoeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("other", "theirs"),
    [
        ({"at": 6, "of": LONG}, "extra['at']=6 on ranks [1]."),
        ({"at": (5,)}, "extra=a tuple is in it, which JSON makes a list on ranks [1]."),
        ({"at": torch.ones(1)}, "extra=Object of type Tensor is not JSON serializable on ranks"),
        ({"at": 5, "of": LONG + "y"}, " on ranks [1]."),
        ({}, " on ranks [1]."),
    ],
)
def test_ranks_that_save_others_are_told_which(
    other: dict[str, Any], theirs: str, tmp_path: Path
) -> None:
    for said in threaded(2, refusal, str(tmp_path), [{"at": 5, "of": LONG}, other]):
        assert "save_checkpoint: the ranks were called with different settings: extra" in said
        assert theirs in said and LONG not in said
        assert ("extra['of']" in said) is (other.get("of") != LONG)
    assert list(tmp_path.iterdir()) == []


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    mesh, extra = MoEMesh.single(), {"best": torch.inf, "deep": [{"a": None}, [1.5, True, "b"]]}
    save_checkpoint(tmp_path / "1", made(mesh), mesh, extra=extra)
    assert load_checkpoint(tmp_path / "1", made(mesh), mesh) == extra
