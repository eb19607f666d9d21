"""The three layers on the same weights, as functions of tokens.

    ours           MoE with torch's grouped matmul, the path that a GPU takes
    transformers   Qwen3-MoE's block with `grouped_mm` experts
    torchtitan     MoE of 0.2.x with its grouped experts; its casts to bfloat16 and its padding of
                   rows, which serve kernels of one kind of GPU, are left out

A peer that is not installed is skipped, and the reason is printed.
"""

# Shape letters in this file:
#   T  tokens    D  model width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, final
from unittest import mock

import torch
from torch import Tensor, nn

from spmd_moe import GroupedMatmul, MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
from spmd_moe.check.adapters.import_framework import empty_modules
from spmd_moe.check.adapters.torchtitan_moe import OPTIONAL
from spmd_moe.layer.grouped_matmul import TorchGroupedMM


@final
@dataclass(frozen=True)
class Sizes:
    dim: int
    hidden_dim: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"D {self.dim}, F {self.hidden_dim}, E {self.experts}, k {self.top_k}"


WIDE, FINE = Sizes(512, 1024, 32, 4), Sizes(512, 128, 128, 8)


@final
@dataclass(frozen=True)
class Layer:
    """A layer: its module, and how tokens `[T, D]` go through it."""

    name: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]


def ours(sizes: Sizes, dtype: torch.dtype, matmul: GroupedMatmul | None) -> Layer:
    mesh = MoEMesh.single()
    router = RouterConfig(sizes.experts, sizes.top_k, route_norm=True)
    layer = MoE(MoEConfig(sizes.dim, sizes.hidden_dim, router), mesh, matmul=matmul)
    if not layer.router.weight_ED.is_meta:
        init_weights(layer, mesh, seed=0, std=sizes.dim**-0.5)
    layer.to(dtype)
    return Layer("ours", layer, lambda x: layer(x).hidden)


def transformers_layer(sizes: Sizes, mine: nn.Module, dtype: torch.dtype) -> Layer:
    models = "transformers.models.qwen3_moe"
    config = import_module(f"{models}.configuration_qwen3_moe").Qwen3MoeConfig(
        hidden_size=sizes.dim,
        moe_intermediate_size=sizes.hidden_dim,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    block: Any = import_module(f"{models}.modeling_qwen3_moe").Qwen3MoeSparseMoeBlock(config)
    weights: Any = mine
    with torch.no_grad():
        block.gate.weight.copy_(weights.router.weight_ED)
        fused = torch.cat([weights.experts.w1_eFD, weights.experts.w3_eFD], 1)
        block.experts.gate_up_proj.copy_(fused)
        block.experts.down_proj.copy_(weights.experts.w2_eDF)
    block.to(dtype)
    return Layer("transformers", block, lambda x: block(x.unsqueeze(0)).squeeze(0))


def torchtitan_layer(sizes: Sizes, mine: nn.Module, dtype: torch.dtype) -> Layer:
    with empty_modules(OPTIONAL):
        titan: Any = import_module("torchtitan.models.moe.moe")
    args = titan.MoEArgs(
        num_experts=sizes.experts,
        num_shared_experts=0,
        score_func="softmax",
        route_norm=True,
        top_k=sizes.top_k,
        score_before_experts=False,
    )
    layer: Any = titan.MoE(args, dim=sizes.dim, hidden_dim=sizes.hidden_dim)
    weights: Any = mine
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.router.weight_ED)
        for name, weight in (
            ("w1", weights.experts.w1_eFD),
            ("w2", weights.experts.w2_eDF),
            ("w3", weights.experts.w3_eFD),
        ):
            getattr(layer.experts, name).copy_(weight)
        layer.expert_bias.zero_()
        layer.tokens_per_expert.zero_()
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)

    def call(x: Tensor) -> Tensor:
        with (
            mock.patch.object(titan, "indices_padding_wrapper", lambda run: run),
            mock.patch.object(titan, "_run_experts_grouped_mm", _without_casts),
            mock.patch.object(torch, "histc", counts_of_ids),
        ):
            y: Tensor = layer(x.unsqueeze(0)).squeeze(0)
            return y

    return Layer("torchtitan", layer, call)


def _without_casts(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """What torchtitan's experts compute, in the dtype of the rows."""
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = (nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=ends) for w in (w1, w3))
    h = nn.functional.silu(gate) * up
    return nn.functional.grouped_mm(h, w2.transpose(-2, -1), offs=ends)


_HISTC = torch.histc


def counts_of_ids(ids: Tensor, *, bins: int, min: int, max: int) -> Tensor:
    """One operator for one: a CPU has no `histc` of integers, nor has a pretended GPU."""
    if type(ids) is Tensor and not ids.is_cpu:
        return _HISTC(ids, bins, min, max)
    return torch.bincount(ids, minlength=bins)


PEERS = {"transformers": transformers_layer, "torchtitan": torchtitan_layer}


def layers(
    sizes: Sizes, dtype: torch.dtype, *, on_grouped_mm: bool = True, device: str = "cpu"
) -> tuple[list[Layer], dict[str, str]]:
    """Ours first, then the peers that can be imported; and why the others cannot.

    `on_grouped_mm`: ours takes the path of a GPU; otherwise what it chooses on this machine.
    """
    missing = dict[str, str]()
    with torch.device(device):
        found = [ours(sizes, dtype, TorchGroupedMM() if on_grouped_mm else None)]
        for name, make in PEERS.items():
            try:
                found.append(make(sizes, found[0].module, dtype))
            except ImportError as error:
                missing[name] = str(error)
    return found, missing
