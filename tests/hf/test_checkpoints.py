"""Checkpoints of transformers, read and written in slices on any layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spmd_moe.hf as hf
from spmd_moe import CheckpointError, MoEMesh, parallelize
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.hf.checkpoint_layout import rows_and_parts
from spmd_moe.hf.safetensors_slices import read_folder
from spmd_moe.train.storage_mesh import settled
from tests.hf.models import MODELS, empty_model_of, long_if, model_of, parts_beside, tokens
from tests.support.workers import run

LAYOUTS = [
    {"dp": 4, "ep": 4},
    {"dp": 2, "tp": 2, "ep": 2},
    {"tp": 4, "ep": 2, "etp": 2},
]


def source(folder: Path, name: str, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    """A checkpoint that transformers has written, and its model."""
    model = model_of(name).to(dtype)
    model.save_pretrained(folder, **how)
    return model


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def there_and_back(
    model: nn.Module, folder: str, to: str, degrees: dict[str, int]
) -> tuple[int, int, int]:
    """Bytes read, bytes that this rank holds, and bytes written."""
    mesh = MoEMesh.init("cpu", **degrees)
    hf.swap(model, mesh)
    read = hf.load(model, folder, mesh)
    written = hf.save(model, to, mesh)
    held = sum(part.tensor.nbytes for _, part in rows_and_parts(model, mesh).values())
    return read, held, written


def empty_there_and_back(name: str, folder: str, to: str, degrees: dict[str, int]) -> Any:
    return there_and_back(empty_model_of(name), folder, to, degrees)


@pytest.mark.parametrize("name", MODELS)
def test_one_process_from_meta(name: str, tmp_path: Path) -> None:
    whole = source(tmp_path / "a", name).eval()
    model, mesh = empty_model_of(name).eval(), MoEMesh.single()
    hf.swap(model, mesh)
    hf.load(model, tmp_path / "a", mesh)
    hf.save(model, tmp_path / "b", mesh)
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert torch.equal(model(tokens()).logits, hf.swap(whole, mesh)(tokens()).logits)


# Files with a tensor for each expert, one for all, and interleaved biases.
EVERY_LAYOUT = ("qwen3_moe", "gpt_oss")
READ = [
    pytest.param(name, degrees, marks=long_if(i % 3 != j and name not in EVERY_LAYOUT))
    for i, name in enumerate(MODELS)
    for j, degrees in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("name", "degrees"), READ, ids=str)
def test_ranks_read_what_they_hold(name: str, degrees: dict[str, int], tmp_path: Path) -> None:
    source(tmp_path / "a", name, max_shard_size="20KB")
    found = threaded(
        4, empty_there_and_back, name, str(tmp_path / "a"), str(tmp_path / "b"), degrees
    )
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert all(read <= held for read, held, _ in found), found
    entries = read_folder(tmp_path / "a").entries.values()
    assert sum(written for _, _, written in found) == sum(e.bytes for e in entries)  # each once


def bfloat16_there_and_back(folder: str, to: str) -> Any:
    model = empty_model_of("deepseek_v3").to(torch.bfloat16)
    return there_and_back(model, folder, to, LAYOUTS[2])


def test_bfloat16(tmp_path: Path) -> None:
    source(tmp_path / "a", "deepseek_v3", torch.bfloat16)
    threaded(4, bfloat16_there_and_back, str(tmp_path / "a"), str(tmp_path / "b"))
    assert same_files(tmp_path / "a", tmp_path / "b")


def stored(
    name: str, folder: str, to: str, degrees: dict[str, int], replicas: int
) -> tuple[bool, bool]:
    """Through FSDP2, and a step of training between two saves.

    Whether this rank read no more than it holds; and whether transformers loads, after training,
    every tensor of this rank equal to the bit.
    """
    from transformers import AutoModelForCausalLM

    mesh = MoEMesh.init("cpu", **degrees)
    model = empty_model_of(name)
    hf.swap(model, mesh)
    parallelize(model, mesh, blocks=model.model.layers, replicas=replicas)
    read = hf.load(model, folder, mesh)
    held = sum(part.tensor.nbytes for _, part in rows_and_parts(model, mesh).values())
    hf.save(model, to + "same", mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    hf.save(model, to, mesh)
    loaded = AutoModelForCausalLM.from_pretrained(to).state_dict()
    found = parts_beside(settled(model), mesh, loaded, lambda parameter: parameter)
    return read <= held, all(torch.equal(ours, values) for _, ours, values in found)


@pytest.mark.gloo
@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.long), 2])
def test_stored_by_fsdp(replicas: int, tmp_path: Path) -> None:
    """All ranks have the same tokens, so gradients are four times those of one process."""
    from transformers import AutoModelForCausalLM

    whole = source(tmp_path / "a", "qwen3_moe")
    folders = str(tmp_path / "a"), str(tmp_path / "b")
    found = run(4, stored, "qwen3_moe", *folders, {"dp": 4, "ep": 2}, replicas, timeout=240.0)
    assert found == [(True, True)] * 4
    assert same_files(tmp_path / "a", tmp_path / "bsame")
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.4)
    whole(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, atol=1e-5, rtol=1e-5)


def test_a_model_that_was_never_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = model_of("mixtral")
    model, mesh = hf.swap(copy.deepcopy(whole), MoEMesh.single()), MoEMesh.single()
    hf.save(model, tmp_path / "one", mesh)
    hf.save(model, tmp_path / "more", mesh, max_shard_bytes=20_000)
    assert len(list((tmp_path / "more").glob("*.safetensors"))) > 3
    for folder in ("one", "more"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(loaded[key], t) for key, t in whole.state_dict().items())


def test_as_transformers_has_it_in_memory(tmp_path: Path) -> None:
    model = source(tmp_path / "a", "qwen3_moe", save_original_format=False)
    ours, mesh = empty_model_of("qwen3_moe"), MoEMesh.single()
    hf.swap(ours, mesh)
    hf.load(ours, tmp_path / "a", mesh)
    expected = hf.swap(model, mesh)(tokens()).logits
    assert torch.equal(ours(tokens()).logits, expected)


def test_save_pretrained_writes_the_names_of_transformers(tmp_path: Path) -> None:
    model = source(tmp_path / "a", "olmoe")
    hf.swap(model, MoEMesh.single())
    model.save_pretrained(tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError, match="save_pretrained: OlmoeModel has layers of spmd_moe"):
        model.model.save_pretrained(tmp_path / "c")


def refused_on_a_rank(model: Any, folder: Path) -> str:
    ours = hf.swap(copy.deepcopy(model), MoEMesh.init("cpu", dp=2, ep=2))
    try:
        ours.save_pretrained(folder)
    except CheckpointError as error:
        return str(error).partition("\n")[0]
    return ""


def test_save_pretrained_on_ranks_is_refused(tmp_path: Path) -> None:
    said = threaded(2, refused_on_a_rank, model_of("olmoe"), tmp_path / "a")
    assert said == ["save_pretrained: OlmoeForCausalLM has layers of spmd_moe."] * 2


def test_a_load_forgets_choices_made_with_other_weights(tmp_path: Path) -> None:
    source(tmp_path, "deepseek_v3")
    mesh = MoEMesh.single()
    model = hf.swap(model_of("deepseek_v3"), mesh)
    model(tokens(), labels=tokens()).loss.backward()  # they are counted in backward
    seen = [buffer for name, buffer in model.named_buffers() if name.endswith("seen_E")]
    assert seen and all(int(buffer.sum()) for buffer in seen)
    hf.load(model, tmp_path, mesh)
    assert not any(int(buffer.sum()) for buffer in seen)
