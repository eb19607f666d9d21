"""Megatron-Core's MoE layer with its own dispatchers and process groups, unmodified.

    megatron:moe --plan alltoall

Plans: the dispatchers `alltoall` and `allgather`. Experts are sharded over all ranks, or, with
`--vary etp=True`, over dp, and their hidden dims over tp. The sequence is sharded over tp. An
argument `loss` is one of aux_loss, seq_aux_loss, and z_loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spmd_moe.check.adapters.import_framework import framework, member
from spmd_moe.check.target import Case, cannot

PLANS = ("alltoall", "allgather")
DIM, HIDDEN, EXPERTS = 16, 24, 8
_CORE = "megatron.core"


def megatron_target(name: str, plan: str | None, path: str | None) -> Callable[..., Case]:
    """A target of the layer, under one dispatcher."""
    plan = plan or "alltoall"
    if name != "moe" or plan not in PLANS:
        have = f"there is megatron:moe; plans are {', '.join(PLANS)}"
        raise cannot("TARGET", f"there is no megatron:{name} --plan {plan}", have)
    framework(_CORE, path)
    settings = member(f"{_CORE}.transformer.transformer_config", "TransformerConfig")
    specification = member(f"{_CORE}.models.gpt.moe_module_specs", "get_moe_module_spec")
    build = member(f"{_CORE}.transformer.spec_utils", "build_module")
    collection = member(f"{_CORE}.process_groups_config", "ProcessGroupCollection")

    def target(
        mesh: DeviceMesh,
        *,
        etp: bool = False,
        top_k: int = 2,
        shared: bool = True,
        loss: str | None = None,
    ) -> Case:
        world, tp = mesh.size(), mesh["tp"].size()
        ep = mesh["dp"].size() if etp else world
        if EXPERTS % ep or (shared and HIDDEN % tp):
            raise ValueError(f"{EXPERTS} experts do not divide over {ep} ranks")
        if loss is not None and mesh["dp"].size() > 1:
            raise ValueError("Megatron's losses are means over the tokens of each rank of dp")
        balance = "none" if loss in (None, "z_loss") else loss
        made = settings(
            num_layers=1,
            hidden_size=DIM,
            num_attention_heads=4,
            ffn_hidden_size=HIDDEN,
            moe_ffn_hidden_size=HIDDEN,
            num_moe_experts=EXPERTS,
            moe_router_topk=top_k,
            moe_router_load_balancing_type=balance,
            moe_aux_loss_coeff=0.0 if balance == "none" else 1.0,
            moe_z_loss_coeff=1.0 if loss == "z_loss" else None,
            moe_router_dtype="fp64",
            moe_token_dispatcher_type=plan,
            moe_shared_expert_intermediate_size=HIDDEN if shared else None,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=nn.functional.silu,
            bias_activation_fusion=False,
            use_cpu_initialization=True,
            tensor_model_parallel_size=tp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=tp if etp else 1,
            sequence_parallel=tp > 1,
        )
        groups = _groups(collection(), mesh, etp)
        spec = specification(use_te=False, num_experts=EXPERTS)
        layer = build(spec, config=made, layer_number=1, pg_collection=groups)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)

        def call(hidden_states: torch.Tensor) -> object:
            out = layer(hidden_states)
            return out[0] if isinstance(out, tuple) else out

        def names(name: str) -> str:
            first = groups.ep.rank() * EXPERTS // ep
            return re.sub(
                r"(?<=local_experts\.)\d+", lambda found: str(int(found[0]) + first), name
            )

        # The trainer sums gradients over tp that Megatron marks as those of a sharded sequence.
        marked = {
            names(n): "tp R"
            for n, p in layer.named_parameters()
            if getattr(p, "sequence_parallel", False)
        }
        packed = {"*linear_fc1.weight": "tp 0 in 2", "*linear_fc2.weight": "tp 1"}
        if not etp:
            packed = {f"shared_experts.{key[1:]}": words for key, words in packed.items()}
        x = torch.randn(8, 4, DIM)  # sequence, batch
        return Case(
            layer,
            (x,),
            ("tp 0, dp 1",),
            call=call,
            trainer="sum dp",
            names=names,
            weights=packed | marked,
        )

    target.__qualname__ = f"megatron:{name} --plan {plan}"
    vars(target).update(axes=("dp", "tp"), stand_ins=("float64", "cuda"))
    vars(target)["patches"] = [
        (member(f"{_CORE}.tensor_parallel.{part}"), "get_global_memory_buffer", _Buffers)
        for part in ("layers", "mappings")
    ]
    exchange = member(f"{_CORE}.transformer.moe.token_dispatcher", "MoEAlltoAllTokenDispatcher")
    vars(target)["patches"].append((exchange, "cuda_dtoh_stream", None))  # set by its instances
    router = member(f"{_CORE}.transformer.moe.router")
    scaler = member(f"{_CORE}.transformer.moe.moe_utils", "MoEAuxLossAutoScaler")
    vars(target)["patches"] += [
        (router, "save_to_aux_losses_tracker", _nothing),  # for logs, on a GPU
        (scaler, "main_loss_backward_scale", torch.tensor(1.0)),
    ]
    notes = ["Megatron's memory buffer is a new tensor for each call"]
    routing = member(f"{_CORE}.transformer.moe.moe_utils")
    if not hasattr(routing, "te_general_gemm"):  # read there, and undefined without that package
        vars(target)["patches"].append((routing, "te_general_gemm", None))
        notes.append("te_general_gemm of the missing transformer_engine is None")
    vars(target)["notes"] = tuple(notes)
    return target


def _groups(found: Any, mesh: DeviceMesh, etp: bool) -> Any:
    """Megatron's groups, made of the axes of the mesh."""
    every = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("all", "one"))
    parts = mesh["tp"], mesh["dp"], every["all"], every["one"]
    tp, dp, world, one = (m.get_group() for m in parts)
    found.tp = found.tp_cp = tp
    found.cp = found.expt_dp = one
    found.dp = found.dp_cp = dp
    found.tp_ep = found.tp_dp_cp = world
    found.ep, found.expt_tp = (dp, tp) if etp else (world, one)
    return found


def _nothing(*args: object, **kwargs: object) -> None:
    return None


@final
class _Buffers:
    """Ranks that are threads cannot share Megatron's buffer of the process."""

    def get_tensor(self, shape: list[int], dtype: torch.dtype, name: str) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)
