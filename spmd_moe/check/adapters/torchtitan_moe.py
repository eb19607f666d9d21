"""torchtitan's MoE layer under its own parallel plans, unmodified.

    torchtitan:moe --plan ep

Plans: `tp` (experts' hidden dims over tp) and `ep` (experts over dp x tp); the sequence is sharded
over tp in both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spmd_moe.check.adapters.import_framework import empty_modules, framework, has, member
from spmd_moe.check.adapters.torchtitan_shardings import DIM, EXPERTS, HIDDEN, typed_target
from spmd_moe.check.target import Case, cannot

# Imported by torchtitan, and not used by its MoE layer on a CPU.
OPTIONAL = frozenset(
    {"triton", "datasets", "tokenizers", "tensorboard", "torch.utils.tensorboard", "wandb"}
    | {"torchao", "PIL", "tiktoken", "sentencepiece", "fsspec", "torchft", "torchcomms"}
    | {"deep_ep", "torchvision", "av", "einops", "torchdata", "tyro", "safetensors"}
)
PLANS = ("tp", "ep")


def torchtitan_target(name: str, plan: str | None, path: str | None) -> Callable[..., Case]:
    """A target of the layer, under one plan."""
    plan = plan or "tp"
    if name != "moe" or plan not in PLANS:
        have = f"there is torchtitan:moe; plans are {', '.join(PLANS)}"
        raise cannot("TARGET", f"there is no torchtitan:{name} --plan {plan}", have)
    with empty_modules(OPTIONAL) as missing:
        framework("torchtitan", path)
        if has("torchtitan.models.common.moe_sharding", "set_moe_sharding_config"):
            return _noted(typed_target(plan), missing)
        layer = member("torchtitan.models.moe", "MoE")
        settings = member("torchtitan.models.moe", "MoEArgs")
        parallelize = member("torchtitan.models.llama4.infra.parallelize", "apply_moe_ep_tp")

    def target(mesh: DeviceMesh, *, batch: int = 4, score_before_experts: bool = True) -> Case:
        made = settings(
            num_experts=EXPERTS,
            num_shared_experts=1,
            top_k=2,
            score_before_experts=score_before_experts,
        )
        block: Any = nn.Module()
        block.moe = layer(made, dim=DIM, hidden_dim=HIDDEN)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(std=0.3)
            for buffer in block.buffers():
                buffer.zero_()
        if mesh.size() > 1:
            block.moe_enabled = True  # the plan asks for it there
            tp = mesh["tp"] if mesh["tp"].size() > 1 else None
            if plan == "tp" and tp is None:
                raise ValueError("plan tp needs tp > 1")
            experts = init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("ep",))
            # Turns ETP off: 0.2.0 takes a flag, later versions meshes.
            names = inspect.signature(parallelize).parameters
            off = {"ep_tp_mesh": None, "etp_enabled": False, "etp_mesh": None, "ep_etp_mesh": None}
            parallelize(
                SimpleNamespace(layers={"0": block}),
                tp_mesh=tp,
                ep_mesh=experts if plan == "ep" else None,
                **{name: value for name, value in off.items() if name in names},
            )
        x = torch.randn(batch, 8, DIM)

        def call(x: torch.Tensor) -> object:
            return block.moe(x)

        return Case(block, (x,), ("dp 0, tp 1",), call=call, trainer="sum dp")

    target.__qualname__ = f"torchtitan:moe --plan {plan}"
    vars(target).update(axes=("dp", "tp"), stand_ins=("float64", "histc", "grouped_mm"))
    kernels = member("torchtitan.models.moe", "kernels")
    fill = kernels.fill_indices_cpu

    def filled(*args: Any, **kwargs: object) -> Any:
        return fill(*args[:6])  # without the sizes of a kernel's blocks

    vars(target)["patches"] = [(kernels, "fill_indices_wrapper", filled)]
    return _noted(target, missing, "torchtitan's triton kernel is its own fill_indices_cpu")


def _noted(target: Callable[..., Case], missing: list[str], *notes: str) -> Callable[..., Case]:
    if missing:
        notes = (*notes, f"empty in place of missing: {', '.join(sorted(missing))}")
    vars(target)["notes"] = notes
    return target
