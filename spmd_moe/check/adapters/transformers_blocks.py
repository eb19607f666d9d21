"""MoE blocks of transformers under its own tensor- and expert-parallel plans, unmodified.

    transformers:mixtral --plan all_to_all

Plans: `tp`, and of expert parallelism `all_reduce`, `all_to_all` (where there is a choice) or `ep`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spmd_moe.check.adapters.import_framework import framework, has, member
from spmd_moe.check.target import Case, cannot

# Of each block: module of the models package, class, configuration, and its own sizes.
_MODELS = "transformers.models"
BLOCKS: dict[str, tuple[str, str, str, dict[str, object]]] = {
    "mixtral": (
        "mixtral",
        "MixtralSparseMoeBlock",
        "MixtralConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}
SIZES: dict[str, object] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
PLANS = ("tp", "ep", "all_reduce", "all_to_all")
_TP = "transformers.distributed.tensor_parallel"
_EP = "transformers.distributed.expert_parallel"


def transformers_target(name: str, plan: str | None, path: str | None) -> Callable[..., Case]:
    """A target of one block, under one plan."""
    plan = plan or "tp"
    if name not in BLOCKS or plan not in PLANS:
        have = f"blocks are {', '.join(BLOCKS)}; plans are {', '.join(PLANS)}"
        raise cannot("TARGET", f"there is no transformers:{name} --plan {plan}", have)
    framework("transformers", path)
    module, block, config, sizes = BLOCKS[name]
    configured = member(f"{_MODELS}.{module}.configuration_{module}", config)
    kind = member(f"{_MODELS}.{module}.modeling_{module}", block)

    def target(
        mesh: DeviceMesh, *, batch: int = 4, length: int = 8, experts: str = "grouped_mm"
    ) -> Case:
        made = configured(**SIZES, **sizes)
        made._experts_implementation = experts
        model: Any = nn.Module()
        model.mlp = kind(made)
        model.config = made  # the plan functions ask for it there
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        if mesh.size() > 1:
            _parallelize(model, mesh, type(made), plan)
        x = torch.randn(batch, length, 16)

        def call(hidden_states: torch.Tensor) -> object:
            out = model.mlp(hidden_states)
            return out[0] if isinstance(out, tuple) else out

        return Case(model, (x,), ("dp 0",), call=call, trainer="sum dp")

    target.__qualname__ = f"transformers:{name} --plan {plan}"
    vars(target).update(axes=("dp", "tp"), stand_ins=("float64", "grouped_mm"))
    return target


def _parallelize(model: nn.Module, mesh: DeviceMesh, config: Any, plan: str) -> None:
    """As `from_pretrained` does it, by the plan functions of the version that is there."""
    tensor, expert = _plan(config, "tp", model), _plan(config, "ep", model)
    if plan != "tp" and not expert:
        raise ValueError(f"{config.__name__} has no ep plan")
    if plan == "tp" and not tensor:
        raise ValueError(f"the tp plan of {config.__name__} has nothing for the block")
    if not has(_EP, "apply_expert_parallelism"):
        _parallelize_by_one_plan(model, mesh, tensor if plan == "tp" else expert)
        return
    apply_tp = member(_TP, "apply_tensor_parallelism")
    if plan == "tp":
        apply_tp(model, mesh["tp"], tensor)
        return
    rest = {key: style for key, style in tensor.items() if key not in expert}
    if rest and mesh["tp"].size() > 1:
        apply_tp(model, mesh["tp"], rest)
    every = init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("ep",))
    apply_ep = member(_EP, "apply_expert_parallelism")
    apply_ep(model, every, mesh["tp"], expert, "auto" if plan == "ep" else plan)


def _parallelize_by_one_plan(model: Any, mesh: DeviceMesh, plan: dict[str, str]) -> None:
    """Versions in which the ep plan stands in the tp plan's place, on the tp mesh."""
    if mesh["tp"].size() > 1:
        model.tp_plan = plan  # the function asks for it there
        member(_TP, "apply_tensor_parallelism")(model, mesh["tp"])


def _plan(config: Any, which: str, model: nn.Module) -> dict[str, str]:
    """What a plan says of the block; the style of a linear layer is that of its weight as well."""
    raw: dict[str, str] = getattr(config, f"base_model_{which}_plan", None) or {}
    prefix = "layers.*.mlp"
    own = {f"mlp{key[len(prefix) :]}": v for key, v in raw.items() if key.startswith(prefix)}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    found = {key: style for key, style in own.items() if key in modules or key in parameters}
    for key in list(found):
        part = modules.get(key)
        if isinstance(part, nn.Linear):
            found.update({f"{key}.{n}": found[key] for n, _ in part.named_parameters()})
    return found
