"""Bad input: a clear error, alike on all ranks, and the model is untouched."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import spmd_moe.hf as hf
from spmd_moe import DP, CheckpointError, ConfigError, MeshError, MoEMesh, SpmdMoeError
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.hf.safetensors_slices import FileIO
from tests.hf.models import VOCABULARY, empty_model_of, model_of, tokens
from tests.support.refused_hf import block

KEY = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "a"
    model_of("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of Qwen3-MoE that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "a"))


def tampered(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    if change == "empty":
        path.unlink()
        return
    if change == "no folder":
        shutil.rmtree(folder)
        return
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if change == "cut":
        path.write_bytes(raw[:-5])
        return
    if change == "foreign":
        path.write_bytes(b"PK\x03\x04" + raw[:100])
        return
    if change == "quantized":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (folder / "config.json").write_text(json.dumps(config))
        return
    if change == "missing":
        del header[KEY]
    elif change == "extra":
        header[f"{KEY}_scale_inv"] = header[KEY]
    elif change == "shape":
        header[KEY]["shape"] = header[KEY]["shape"][::-1]
    elif change == "dtype":
        header[KEY]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


REFUSED = {
    "no folder": "'a' is not a folder",
    "empty": "'a' is damaged or foreign: model.safetensors is not there",
    "cut": "'a' is damaged or foreign: model.safetensors is cut: it has",
    "foreign": "'a' is damaged or foreign: model.safetensors is cut or of another format",
    "quantized": "'a' is quantized: fp8",
    "missing": f"'a' lacks {KEY!r}",
    "extra": f"'a' has '{KEY}_scale_inv', which the model has not",
    "shape": f"has {KEY!r} as F32[16, 24]",
    "dtype": "as F8_E4M3[24, 16], a dtype that is not known here",
}


def filled(mesh: MoEMesh) -> nn.Module:
    """A model whose weights are all 0.5."""
    model: nn.Module = hf.swap(model_of("qwen3_moe"), mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def loads_nothing(folder: Path) -> list[str]:
    """What is raised for a model on meta and one with weights, both of which stay as they are."""
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    said = []
    for model in (hf.swap(empty_model_of("qwen3_moe"), mesh), filled(mesh)):
        with pytest.raises(CheckpointError) as error:
            hf.load(model, folder, mesh)
        said.append(str(error.value).partition("\n")[0])
        assert all(p.is_meta or bool((p == 0.5).all()) for p in model.parameters())
    return said


@pytest.mark.parametrize("change", REFUSED)
def test_bad_checkpoints_leave_the_model_untouched(change: str, copied: Path) -> None:
    tampered(copied, change)
    (said, other) = threaded(2, loads_nothing, copied)
    assert said == other and all(REFUSED[change] in text for text in said), said


def reads_another(folders: list[Path]) -> str:
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    model = filled(mesh)
    with pytest.raises(SpmdMoeError) as error:
        hf.load(model, folders[mesh[DP].rank], mesh)
    assert all(bool((p == 0.5).all()) for p in model.parameters())
    return f"{type(error.value).__name__} {error.value}".partition("\n")[0]


def test_a_checkpoint_that_one_rank_sees_damaged_is_refused_on_all(
    checkpoint: Path, copied: Path
) -> None:
    tampered(copied, "cut")
    said = threaded(2, reads_another, [checkpoint, copied])
    assert said[0] == said[1] and said[0].startswith("MeshError hf.load: "), said


def fewer_experts(model: nn.Module) -> tuple[str, bool]:
    names = [name for name, _ in model.named_parameters()]
    try:
        hf.swap(model, MoEMesh.init("cpu", dp=4, ep=4))
    except ConfigError as error:
        return str(error).partition("\n")[0], names == [n for n, _ in model.named_parameters()]
    return "", False


def test_fewer_experts_than_ranks() -> None:
    model = model_of("mixtral", num_local_experts=2)
    found = threaded(4, fewer_experts, model)
    said = "hf.swap: 'model.layers.0.mlp' has 2 experts, for axis 'ep' (4 ranks)."
    assert found == [(said, True)] * 4


def unknown(model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError) as error:
        hf.swap(model, MoEMesh.init("cpu", dp=2, ep=2))
    assert names == [name for name, _ in model.named_modules()]
    return str(error.value).partition("\n")[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("DogeCDMoE", "'mlp' is DogeCDMoE, of which"), ("NewExperts", "'mlp' is NewExperts, of no")],
)
def test_unknown_families(kind: str, words: str) -> None:
    said = threaded(2, unknown, block(kind))
    assert said[0] == said[1] and words in said[0]


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    model_of("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path)
    model, mesh = hf.swap(model_of("qwen3_moe"), MoEMesh.single()), MoEMesh.single()
    with pytest.raises(CheckpointError, match=r"the model as f32: model.to\(torch.bfloat16\)"):
        hf.load(model, tmp_path, mesh)


def test_nothing_is_written_over(copied: Path) -> None:
    mesh = MoEMesh.single()
    with pytest.raises(CheckpointError, match=r"'a' has model\.safetensors already"):
        hf.save(hf.swap(model_of("qwen3_moe"), mesh), copied, mesh)


MESH = MoEMesh.single()
CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "load a linear": (lambda _: hf.load(nn.Linear(2, 2), "a", MESH), "Linear was not changed by"),
    "swap a linear": (lambda _: hf.swap(nn.Linear(2, 2), MESH), "no block to swap: it has no MoE"),
    "load nothing": (lambda _: hf.load(None, "a", MESH), "model is None"),  # type: ignore[arg-type]  # wrong on purpose
    "swap nothing": (lambda _: hf.swap(None, MESH), "model is None"),  # type: ignore[type-var]  # wrong on purpose
    "load of nowhere": (lambda model: hf.load(model, None, MESH), "folder is None"),  # type: ignore[arg-type]  # wrong on purpose
    "save to nowhere": (lambda model: hf.save(model, None, MESH), "folder is None"),  # type: ignore[arg-type]  # wrong on purpose
    "load on no mesh": (lambda model: hf.load(model, "a", None), "mesh is None"),  # type: ignore[arg-type]  # wrong on purpose
    "save on no mesh": (lambda model: hf.save(model, "a", None), "mesh is None"),  # type: ignore[arg-type]  # wrong on purpose
    "swap on no mesh": (lambda model: hf.swap(model, None), "mesh is None"),  # type: ignore[arg-type]  # wrong on purpose
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_of_another_kind(call: str) -> None:
    act, words = CALLS[call]
    with pytest.raises(ConfigError, match=words):
        act(hf.swap(model_of("mixtral"), MESH))


def loads_on_another_mesh(model: nn.Module) -> str:
    swapped = hf.swap(copy.deepcopy(model), MoEMesh.init("cpu", dp=2, ep=2))
    with pytest.raises(ConfigError) as error:
        hf.load(swapped, "a", MoEMesh.init("cpu", tp=2, etp=2))
    return str(error.value).partition("\n")[0]


def test_another_mesh_than_that_of_the_layers() -> None:
    said = threaded(2, loads_on_another_mesh, model_of("mixtral"))
    assert said[0].startswith("hf.load: the layers of the model are on MoEMesh(")


def test_settings_that_the_layer_refuses_are_told_with_the_block() -> None:
    model: Any = model_of("mixtral")
    model.model.layers[1].mlp.gate.top_k = 9
    words = "hf.swap: 'model.layers.1.mlp' is MixtralSparseMoeBlock. RouterConfig: top_k is 9"
    with pytest.raises(ConfigError, match=words):
        hf.swap(model, MESH)
    model.model.layers[1].mlp.gate.top_k = 2
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp' .* MoEConfig: balance is 'all'"):
        hf.swap(model, MESH, balance="all")  # type: ignore[arg-type]  # wrong on purpose


def test_embeddings_are_resized_before() -> None:
    model: Any = model_of("mixtral")
    model.resize_token_embeddings(VOCABULARY + 4)
    swapped = hf.swap(model, MESH)
    assert swapped(tokens()).logits.shape[-1] == VOCABULARY + 4
    for each in (swapped, swapped.model):
        with pytest.raises(ConfigError, match=r"before hf\.swap"):
            each.resize_token_embeddings(VOCABULARY + 8)


def on_cp(model: Any) -> tuple[str, bool]:
    mesh = MoEMesh.init("cpu", cp=2, ep=2)
    own: Any = copy.deepcopy(model)
    with pytest.raises(ConfigError) as error:
        hf.swap(own, mesh)
    own.config._attn_implementation = "ring"  # one that knows cp
    return str(error.value).partition("\n")[0], hf.swap(own, mesh) is own


def test_attention_that_does_not_support_cp() -> None:
    said = (
        "hf.swap: the attention 'sdpa' of MixtralForCausalLM does not support axis 'cp' (2 ranks)."
    )
    assert threaded(2, on_cp, model_of("mixtral")) == [(said, True)] * 2


# --- files that cannot be read or written -------------------------------------------------------


def fails_on_rank_1(method: Callable[..., Any]) -> Callable[..., Any]:
    def act(self: FileIO, *args: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(errno.EIO, "Input/output error")
        return method(self, *args)

    return act


def saves_nothing(folder: Path) -> str:
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    model = filled(mesh)
    with pytest.raises(MeshError) as error:
        hf.save(model, folder, mesh)
    return str(error.value).partition("\n")[0]


def test_a_save_that_fails_on_one_rank_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileIO, "write", fails_on_rank_1(FileIO.write))
    said = threaded(2, saves_nothing, tmp_path / "new" / "a")
    assert said[0] == said[1] and "Input/output error" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_load_that_fails_on_one_rank_is_told_on_all(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileIO, "read", fails_on_rank_1(FileIO.read))
    said = threaded(2, loads_in_part, checkpoint)
    assert said[0] == said[1] and "Input/output error" in said[0]


def loads_in_part(folder: Path) -> str:
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    model = filled(mesh)
    with pytest.raises(MeshError) as error:
        hf.load(model, folder, mesh)
    return str(error.value).partition("\n")[0]


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'],
    ids=["nested", "infinite"],
)
def test_headers_that_python_cannot_read_are_refused(header: bytes, tmp_path: Path) -> None:
    length = len(header).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(length + header + bytes(8))
    model = hf.swap(model_of("mixtral"), MoEMesh.single())
    with pytest.raises(CheckpointError, match="has a header that cannot be read"):
        hf.load(model, tmp_path, MoEMesh.single())
