"""DeepSpeed's AutoEP layer, which takes the place of a model's MoE block, unmodified.

Experts are sharded over all ranks. Where tp > 1, tokens are the same on the ranks of tp, each of
which dispatches a part of them (AutoEP folded into AutoTP); DeepSpeed's own function then reduces
the gradients over tp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from spmd_moe.check.adapters.import_framework import member
from spmd_moe.check.target import Case

DIM, HIDDEN, EXPERTS = 16, 24, 8
LAYER = "deepspeed.module_inject.auto_ep_layer"
FOLDING = "deepspeed.module_inject.auto_ep_folding"
DISPATCH = "deepspeed.moe.ep_tp_dispatch"


def autoep_target() -> Callable[..., Case]:
    """A target of the layer; deepspeed is imported."""
    layer = member(LAYER, "AutoEPMoELayer")
    describe, settings = member(LAYER, "MoELayerSpec"), member(LAYER, "AutoEPConfig")
    folding: Any = member(FOLDING)

    def target(mesh: DeviceMesh, *, batch: int = 4, top_k: int = 2) -> Case:
        world, tp = mesh.size(), mesh["tp"]
        if EXPERTS % world:
            raise ValueError(f"{EXPERTS} experts do not divide over {world} ranks")
        spec = describe(
            moe_module_name="block",
            model_family="mixtral",
            router_name="gate",
            experts_name="experts",
            expert_storage="module_list",
            expert_w1_name="w1",
            expert_w2_name="w2",
            expert_w3_name="w3",
            num_experts=EXPERTS,
            top_k=top_k,
            hidden_size=DIM,
            ffn_hidden_size=HIDDEN,
            score_func="softmax",
            score_apply="post",
            route_norm=True,
            gate_bias=False,
            return_router_logits=False,
            router_logits_capture_target="none",
            router_logits_capture_index=None,
            router_logits_capture_layer_name=None,
            has_shared_experts=True,
            shared_experts_name="shared",
        )
        moe = layer(spec, _Block(), world, dist.get_rank(), settings(load_balance_coeff=None))
        folded = None
        if world > 1:
            sizes = {"world_size": world, "pp_size": 1, "tp_size": tp.size(), "ep_size": world}
            folded = folding.build_folding_spec(**sizes)
            moe.set_deepspeed_parallelism(folding_group_handles=_handles(folding, folded, mesh))
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter.normal_(std=0.3)

        def reduce(module: nn.Module, mesh: Any) -> None:
            for parameter in module.parameters():
                if parameter.grad is None:
                    continue
                if tp.size() > 1:
                    folding.reduce_autoep_folding_gradient(
                        folded, parameter, parameter.grad, tp_group=tp.get_group()
                    )
                if getattr(parameter, "allreduce", True):
                    dist.all_reduce(parameter.grad, group=mesh["dp"].get_group())

        words = {"experts.*": "dp 0, tp 0", "tokens_per_expert": "dp P"}
        x = torch.randn(batch, 8, DIM)
        return Case(moe, (x,), ("dp 0",), trainer=reduce, weights=words)

    return target


def _handles(folding: Any, spec: Any, mesh: DeviceMesh) -> Any:
    ranks = folding.local_folding_ranks(dist.get_rank(), spec)
    return folding.FoldingGroupHandles(
        spec=spec,
        tp_group=mesh["tp"].get_group(),
        dense_dp_group=mesh["dp"].get_group(),
        ep_group=dist.group.WORLD,
        edp_group=None,
        ep_group_name=f"ep_size_{spec.ep_size}",
        tp_ranks=ranks["tp"],
        dense_dp_ranks=ranks["dense_dp"],
        ep_ranks=ranks["ep"],
        edp_ranks=ranks["edp"],
    )


@final
class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=False)


@final
class _Block(nn.Module):
    """A model's MoE block before AutoEP replaces it; only its weights are read."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = nn.ModuleList(_Expert() for _ in range(EXPERTS))
        self.shared = nn.Linear(DIM, DIM, bias=False)
