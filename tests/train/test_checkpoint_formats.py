"""Checkpoints in the hands of other tools: safetensors, and torch.distributed.checkpoint."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from spmd_moe import (
    CheckpointError,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    init_weights,
    load_checkpoint,
    save_checkpoint,
)
from spmd_moe.check.command_line import main
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.train.checkpoint.convert import convert
from spmd_moe.train.checkpoint.safetensors_file import DTYPES, make_header

MESH = MoEMesh.single()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's tools


def made(seed: int, mesh: MoEMesh = MESH) -> tuple[MoE, torch.optim.Optimizer]:
    layer = MoE(MoEConfig(4, 8, RouterConfig(4, 2)), mesh)
    init_weights(layer, mesh, seed=seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01 * (1 + seed))
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return layer, optimizer


def saved_on_ranks(folder: str) -> None:
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    layer, optimizer = made(0, mesh)
    dist.barrier()
    save_checkpoint(f"{folder}/1", layer, mesh, optimizer, {"step": 1, "best": float("inf")})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, with experts cut over them."""
    threaded(2, saved_on_ranks, str(tmp_path))
    return tmp_path / "1"


def test_safetensors_opens_the_files(saved: Path) -> None:
    layer, _ = made(0)
    found: dict[str, torch.Tensor] = {}
    for rank in (0, 1):
        found |= load_file(saved / f"rank{rank}.safetensors")
    w1 = layer.experts.w1_eFD
    for first, last in ((0, 2), (2, 4)):
        assert torch.equal(found[f"experts.w1_eFD[{first}:{last},0:8,0:4]"], w1[first:last])
    assert torch.equal(found["router.weight_ED"], layer.router.weight_ED)
    with safe_open(saved / "rank0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    data = bytes(range(1, 9)) * 3 if dtype is not torch.bool else bytes([1, 0, 1])
    tensor = torch.frombuffer(bytearray(data), dtype=dtype)
    text = make_header([("some.name", dtype, tuple(tensor.shape))])
    (tmp_path / "x").write_bytes(text + data)
    found = load_file(tmp_path / "x")["some.name"]
    assert found.dtype is dtype and found.view(torch.uint8).tolist() == list(data)


def loads_as(path: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    layer, optimizer = made(5)
    extra = load_checkpoint(path, layer, MESH, optimizer)
    moments = [v for p in layer.parameters() for v in optimizer.state[p].values()]
    return extra | optimizer.param_groups[0] | {"params": 0}, [*layer.parameters(), *moments]


def test_to_dcp_and_back(saved: Path, tmp_path: Path) -> None:
    convert(saved, tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "2")
    (ours, mine), (theirs, other) = loads_as(saved), loads_as(tmp_path / "2")
    assert ours == theirs and ours["step"] == 1 and ours["lr"] == 0.01
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True)) and len(mine) == 16


def test_torchs_tools_read_it(saved: Path, tmp_path: Path) -> None:
    convert(saved, tmp_path / "dcp")
    dcp_to_torch_save(str(tmp_path / "dcp"), tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    layer, _ = made(0)
    for name, value in layer.state_dict().items():
        assert torch.equal(whole[name], value), name
    loaded = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(loaded[name], p) for name, p in layer.named_parameters())


def test_what_torch_saved_becomes_a_checkpoint(tmp_path: Path) -> None:
    layer, _ = made(0)
    dcp.save(dict(layer.state_dict()), checkpoint_id=tmp_path / "dcp", no_dist=True)
    convert(tmp_path / "dcp", tmp_path / "1")
    loaded, _ = made(5)
    assert load_checkpoint(tmp_path / "1", loaded, MESH) == {}
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), loaded.parameters()))  # noqa: B905


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("where", ["metadata", "tensor"])
def test_a_strangers_pickle_does_not_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layer, _ = made(0)
    save_checkpoint("1", layer, MESH)
    convert("1", "dcp")
    if where == "metadata":
        (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    else:
        (data,) = (tmp_path / "dcp").glob("*.distcp")
        torch.save(Evil(), data)
        with open(data, "ab") as file:
            file.write(bytes(10_000))
    with pytest.raises(CheckpointError, match="is damaged"):
        convert("dcp", "2")
    assert sorted(os.listdir()) == ["1", "dcp"]


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp_folder, back = str(tmp_path / "dcp"), str(tmp_path / "2")
    assert main(["convert", str(saved), dcp_folder]) == 0
    assert (tmp_path / "dcp" / ".metadata").is_file()
    assert main(["convert", dcp_folder, back]) == 0
    assert sorted(p.name for p in Path(back).iterdir()) == ["index.json", "rank0.safetensors"]
    for source, target, says in (
        (str(saved), dcp_folder, "convert: 'dcp' exists"),
        (dcp_folder, back, "convert: '2' exists"),
        (str(tmp_path / "nothing"), str(tmp_path / "3"), "convert: 'nothing' "),
    ):
        assert main(["convert", source, target]) == 2
        assert capsys.readouterr().err.startswith(says)
    assert not (tmp_path / "3").exists()
