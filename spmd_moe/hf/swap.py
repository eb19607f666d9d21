"""`MoE` in the place of every MoE block of a transformers model.

model = AutoModelForCausalLM.from_config(config)     # or from_pretrained; or on meta
hf.swap(model, mesh)
hf.load(model, folder, mesh)                         # where it has no weights yet
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, final

import torch
from torch import Tensor, nn

from spmd_moe.core.declare_placements import declare_placements
from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import CP, DP, EP, TP, I, Kind, Placed, R, S
from spmd_moe.core.validate import check_instance, check_one_of
from spmd_moe.hf.block import block_of
from spmd_moe.hf.checkpoint_layout import Layout, rows_and_parts, set_layout, zero_buffers
from spmd_moe.hf.element_map import FileTensor
from spmd_moe.hf.find_blocks import (
    FoundBlock,
    Refusal,
    aliases,
    cut_sequences,
    find_blocks,
    memory_tensors,
    naming,
    ndims_and_experts,
    tensor_at,
    uneven,
)
from spmd_moe.hf.model_methods import override_methods
from spmd_moe.hf.names_on_disk import NoConversionError, disk_tensors
from spmd_moe.layer.grouped_matmul import GroupedMatmul
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import ExpertRecompute, MoEConfig

Model = TypeVar("Model", bound=nn.Module)
Balance = Literal["batch", "sequence"] | None


def swap(
    model: Model,
    mesh: MoEMesh,
    *,
    tokens: Kind = I,
    matmul: GroupedMatmul | None = None,
    recompute: ExpertRecompute = ExpertRecompute.NONE,
    balance: Balance = None,
    router_in_model_dtype: bool = False,
) -> Model:
    """Put `MoE` in the place of every MoE block of a transformers model; in place.

    Weights that the model has are taken over, each rank's part of them; a model on the meta device
    stays there until `load`. Every parameter that has no placement yet is declared replicated.
    Every rank must call it. What the layer cannot express is refused before anything is changed.

    Args:
        model: A model of transformers, whole on each rank or on the meta device.
        mesh: The mesh that the layers are on.
        tokens: What the ranks of tp hold: I, all of them the same tokens, or S(0), each its own.
        matmul: As of `MoE`.
        recompute: As of `MoEConfig`.
        balance: As of `MoEConfig`.
        router_in_model_dtype: Whether routers multiply in the dtype of the model, as transformers
            does for most families. See `RouterConfig.in_model_dtype`.

    Returns:
        The same model.

    Raises:
        ConfigError: A block or a setting that the layer cannot express.

    Example:
        >>> model = spmd_moe.hf.swap(AutoModelForCausalLM.from_config(config), mesh)
    """
    check_mesh("hf.swap", mesh)
    fix = "model=AutoModelForCausalLM.from_config(config)"
    check_instance("hf.swap", "model", model, nn.Module, fix)
    check_one_of("hf.swap", "tokens", tokens, (I, S(0)))
    choices = _Choices(tokens, recompute, balance, router_in_model_dtype)
    found = find_blocks(model)
    if not isinstance(found, Refusal):
        found = uneven(found, mesh[EP]) or cut_sequences(model, mesh[CP]) or found
    planned = found if isinstance(found, Refusal) else _plan(model, found)
    if isinstance(found, Refusal) or isinstance(planned, Refusal):
        refusal = found if isinstance(found, Refusal) else planned
        assert isinstance(refusal, Refusal)
        raise ConfigError(explain("hf.swap", refusal.what, why=refusal.why, fixes=[refusal.fix]))
    layout, theirs = planned
    layers = [_layer(each, mesh, theirs, layout, choices, matmul) for each in found]
    for each, layer in zip(found, layers, strict=True):
        parent, _, name = each.name.rpartition(".")
        block = block_of(layer, each.family, each.module).train(each.module.training)
        model.get_submodule(parent).add_module(name, block)
    tp = TP[R] if tokens == S(0) else TP[I]
    declare_placements(model, rest=Placed[Tensor, DP[R], CP[R], tp])
    _take_over(model, mesh, layout.memory, theirs)
    set_layout(model, layout)
    override_methods(model, mesh)
    return model


def _plan(
    model: nn.Module, found: Sequence[FoundBlock]
) -> tuple[Layout, dict[str, Tensor]] | Refusal:
    """Where every parameter lies in checkpoints, and transformers' tensors by their names."""
    memory = memory_tensors(model, found)
    theirs = {tensor.key: tensor_at(model, tensor.key) for tensor in memory}
    try:
        disk = disk_tensors(model, memory, *ndims_and_experts(memory, theirs))
    except NoConversionError as error:
        return Refusal(
            f"the checkpoint of {type(model).__name__} cannot be read in parts: {error}",
            "a rank reads the bytes that it holds, so every tensor has to be parts of others",
            "leave this model as it is; docs/hf_families.md lists what can be swapped",
        )
    return Layout(disk, memory, aliases(model)), theirs


@final
@dataclass(frozen=True, slots=True)
class _Choices:
    """Options of `swap` for all layers."""

    tokens: Kind
    recompute: ExpertRecompute
    balance: Balance
    router_in_model_dtype: bool


def _config(each: FoundBlock, choices: _Choices) -> MoEConfig:
    settings = each.settings
    return MoEConfig(
        settings.dim,
        settings.hidden_dim,
        replace(settings.router, in_model_dtype=choices.router_in_model_dtype),
        activation=settings.activation,
        bias=settings.bias,
        score_application=settings.application,
        recompute=choices.recompute,
        shared=settings.shared,
        src=choices.tokens,
        dst=choices.tokens,
        balance=choices.balance,
    )


def _layer(
    each: FoundBlock,
    mesh: MoEMesh,
    theirs: Mapping[str, Tensor],
    layout: Layout,
    choices: _Choices,
    matmul: GroupedMatmul | None,
) -> MoE:
    """The layer, its parameters of the dtypes and on the device of transformers'."""
    with torch.device("meta"), naming(each.name, type(each.module).__name__):
        layer = MoE(_config(each, choices), mesh, matmul=matmul)
    prefix, device = each.ours(""), None
    for tensor in layout.memory:
        for name in tensor.names:
            if name.startswith(prefix):
                like = theirs[tensor.key]
                device = like.device
                _set_dtype(layer, name.removeprefix(prefix), like)
    assert device is not None
    layer = layer.to_empty(device=device)
    if device.type != "meta":
        zero_buffers(layer.router)
    return layer


def _set_dtype(layer: MoE, name: str, like: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = layer.get_submodule(path)
    parameter = module._parameters.get(own)
    if parameter is not None:  # the selection bias keeps its own
        module.register_parameter(
            own, nn.Parameter(parameter.to(like.dtype), requires_grad=like.requires_grad)
        )


@torch.no_grad()
def _take_over(
    model: nn.Module,
    mesh: MoEMesh,
    memory: Sequence[FileTensor],
    theirs: Mapping[str, Tensor],
) -> None:
    """Copy each rank's part of what the model has."""
    found = rows_and_parts(model, mesh)
    for tensor in memory:
        data = theirs[tensor.key]
        if tensor.names == (tensor.key,) or data.is_meta:
            continue
        parts = [found[name][1] for name in tensor.names]
        box = tensor.box(parts[0])
        if box is None:
            continue
        fine = data.detach().view(tensor.fine_shape(parts[0].whole))
        for dim, (start, size) in enumerate(box):
            fine = fine.narrow(dim, start, size)
        for region, values in tensor.regions(parts, box, fine):
            region.copy_(values)
