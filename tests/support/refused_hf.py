"""What `spmd_moe.hf` refuses: the cases of `test_errors.py`, without transformers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn

import spmd_moe.hf as hf
from spmd_moe import MoEMesh, declare_placements
from spmd_moe.core.placement import SharedWeight
from spmd_moe.hf import model_methods, pooled_loss
from spmd_moe.hf.checkpoint_layout import Layout, set_layout
from spmd_moe.hf.element_map import FileTensor
from spmd_moe.hf.safetensors_slices import FileIO
from tests.support.simulated_ranks import fake_world

MESH = MoEMesh.single()


class Small(nn.Linear):
    """One weight, with the table that `swap` would make."""

    def __init__(self) -> None:
        super().__init__(4, 3, bias=False)
        declare_placements(self, {"*": SharedWeight})
        table = [FileTensor("weight", ("weight",), ((0,), (1,)))]
        set_layout(self, Layout(table, table, {}))


def block(name: str) -> nn.Module:
    """A model with a block of a class that transformers has."""
    kind = type(name, (nn.Module,), {"__module__": "transformers.models.tiny.modeling_tiny"})
    model = nn.Module()
    model.mlp = kind()
    return model


def mixtral(experts: int, **config: object) -> nn.Module:
    """A model with one block of Mixtral, as its record reads it."""
    model = block("MixtralSparseMoeBlock")
    mlp: Any = model.mlp
    mlp.gate, mlp.experts, mlp.jitter_noise = nn.Module(), nn.Module(), 0.0
    mlp.gate.weight, mlp.gate.top_k = nn.Parameter(torch.zeros(experts, 4)), 2
    mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(experts, 6, 4))
    mlp.experts.down_proj = nn.Parameter(torch.zeros(experts, 4, 3))
    mlp.experts.act_fn = nn.SiLU()
    cast(Any, model).config = SimpleNamespace(**config)
    return model


def compiled() -> nn.Module:
    """A model as `torch.compile` wraps it."""
    model = nn.Module()
    model._orig_mod = mixtral(4)
    return model


def hooked() -> nn.Module:
    model: Any = mixtral(4)
    model.mlp.experts.register_forward_hook(lambda module, args, out: out)
    return cast(nn.Module, model)


def too_many_choices() -> nn.Module:
    model: Any = mixtral(4)
    model.mlp.gate.top_k = 9
    return cast(nn.Module, model)


def load_on_another_mesh() -> None:
    with fake_world(4):
        model = hf.swap(mixtral(4), MoEMesh.init("cpu", dp=4, ep=4))
        hf.load(model, "a", MoEMesh.init("cpu", dp=4, ep=2))


def swap_on_cp() -> None:
    with fake_world(4):
        model = mixtral(4, _attn_implementation="sdpa")
        hf.swap(model, MoEMesh.init("cpu", cp=4, ep=4))


def swap_on_four() -> None:
    with fake_world(4):
        hf.swap(mixtral(2), MoEMesh.init("cpu", dp=4, ep=4))


def loading(spoil: Callable[[Path], object]) -> Callable[[], object]:
    def act() -> object:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "a"
            hf.save(Small(), path, MESH)
            spoil(path)
            return hf.load(Small(), path, MESH)

    return act


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def wider(path: Path) -> None:
    model = Small()
    model.weight = nn.Parameter(torch.zeros(3, 5))
    (path / "model.safetensors").unlink()
    hf.save(model, path, MESH)


def save_twice() -> None:
    with TemporaryDirectory() as folder:
        hf.save(Small(), Path(folder) / "a", MESH)
        hf.save(Small(), Path(folder) / "a", MESH)


def save_without_room() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with TemporaryDirectory() as folder, patch.object(FileIO, "write", side_effect=full):
        hf.save(Small(), Path(folder) / "a", MESH)


BAD_HF: dict[str, Callable[[], object]] = {
    "hf_no_block": lambda: hf.swap(nn.Linear(2, 2), MESH),
    "hf_unsupported_block": lambda: hf.swap(block("DogeCDMoE"), MESH),
    "hf_unknown_experts": lambda: hf.swap(block("TinyExperts"), MESH),
    "hf_fewer_experts_than_ranks": swap_on_four,
    "hf_quantized_model": lambda: hf.swap(mixtral(4, quantization_config=object()), MESH),
    "hf_compiled_model": lambda: hf.swap(compiled(), MESH),
    "hf_hooked_block": lambda: hf.swap(hooked(), MESH),
    "hf_settings_of_a_block": lambda: hf.swap(too_many_choices(), MESH),
    "hf_another_mesh": load_on_another_mesh,
    "hf_not_swapped": lambda: hf.load(nn.Linear(2, 2), "a", MESH),
    "hf_load_no_folder": lambda: hf.load(nn.Linear(2, 2), None, MESH),  # type: ignore[arg-type]  # wrong on purpose
    "hf_load_cut": loading(cut),
    "hf_load_other_shape": loading(wider),
    "hf_save_twice": save_twice,
    "hf_save_no_room": save_without_room,
    "hf_save_pretrained": lambda: model_methods._save_pretrained(nn.Linear(2, 2), "a"),
    "hf_attention_on_cp": swap_on_cp,
    "hf_resize_token_embeddings": lambda: model_methods._resize_token_embeddings(
        nn.Linear(2, 2), 8
    ),
    "hf_pooled_loss_in_a_tuple": lambda: pooled_loss.refuse_tuple(
        nn.Linear(2, 2), {"output_router_logits": True}
    ),
}
