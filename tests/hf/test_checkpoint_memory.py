"""The memory that reading and writing a checkpoint takes, on real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spmd_moe.hf as hf
from spmd_moe import MoEMesh
from spmd_moe.hf.checkpoint_layout import rows_and_parts
from tests.hf.models import config_of
from tests.support.workers import run

MIB = 1 << 20
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_local_experts": 16,  # of GPT-OSS
    "num_experts": 16,  # of Qwen3-MoE
    "head_dim": 64,
}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def wide_model(name: str) -> Any:
    """About 100 MiB, without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name, **WIDE))


def resident(which: str) -> int:
    """`VmRSS`, what is in memory now, or `VmHWM`, the most since the mark was reset."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def on_a_rank(name: str, folder: str, to: str, degrees: dict[str, int]) -> dict[str, int]:
    mesh = MoEMesh.init("cpu", **degrees)
    model = wide_model(name)
    hf.swap(model, mesh)
    before = resident("VmRSS")
    CLEAR.write_text("5")  # resets the mark
    read = hf.load(model, folder, mesh)
    loading = resident("VmHWM") - before
    parts = [part.tensor.nbytes for _, part in rows_and_parts(model, mesh).values()]
    before = resident("VmRSS")
    CLEAR.write_text("5")
    hf.save(model, to, mesh)
    saving = resident("VmHWM") - before
    held = sum(parts)
    return {
        "read": read,
        "held": held,
        "loading": loading - held,
        "saving": saving,
        "slice": 2 * max(parts),  # gate and up are one tensor of the file
    }


@pytest.mark.gloo
@pytest.mark.skipif(not CLEAR.exists(), reason="peaks are measured by Linux")
@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("qwen3_moe", {"dp": 4, "ep": 4}),
        pytest.param("gpt_oss", {"dp": 4, "ep": 4}, marks=pytest.mark.long),
        ("gpt_oss", {"tp": 4, "ep": 2, "etp": 2}),
    ],
    ids=str,
)
def test_a_rank_needs_memory_for_what_it_holds(
    name: str, degrees: dict[str, int], tmp_path: Path
) -> None:
    whole = wide_model(name).to_empty(device="cpu")
    whole.save_pretrained(tmp_path / "a")
    size = sum(parameter.nbytes for parameter in whole.parameters())
    folders = str(tmp_path / "a"), str(tmp_path / "b")
    found = run(4, on_a_rank, name, *folders, degrees, timeout=240.0)
    for rank in found:
        more = 60 * MIB + rank["slice"]
        assert rank["loading"] < more and rank["saving"] < more, rank
        assert rank["read"] <= 1.05 * rank["held"], rank
        assert rank["held"] + more < size  # so that a rank with all of it would be found
