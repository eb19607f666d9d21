"""Tiny blocks and models of transformers, with random weights, made from the records."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spmd_moe.hf.family import Family

DIM, HIDDEN, EXPERTS, TOP_K = 32, 24, 8, 3

# By any name that a config has for it.
_SIZES = {
    "hidden_size": DIM,
    "d_model": DIM,
    "intermediate_size": HIDDEN,
    "moe_intermediate_size": HIDDEN,
    "ffn_hidden_size": HIDDEN,
    "expert_ffn_hidden_size": HIDDEN,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "share_expert_dim": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_top_k": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "zero_expert_num": 0,
    "moe_router_logit_softcapping": 1.5,
    "router_hidden_size": 12,
    "swiglu_limit": 0.7,
    "moe_latent_size": None,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "router_jitter_noise": 0.0,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "Lfm2MoeSparseMoeBlock": {"use_expert_bias": True},
    "PhimoeExperts": {"num_experts_per_tok": 2},
    "DeepseekV2Moe": {"topk_method": "group_limited_greedy"},
    "Step3p7SparseMoeBlock": {"swiglu_limits": [0.7, 0.0], "swiglu_limits_shared": [0.4, 0.0]},
    "DeepseekV4SparseMoeBlock": {"mlp_layer_types": ["moe", "moe"]},
    "Cohere2MoeSparseMoeBlock": {"shared_expert_combination_strategy": "sum"},
}
LATENT = {"moe_latent_size": 12}  # of Nemotron-H
_PLAIN: dict[str, Any] = {
    "_experts_implementation": "eager",
    "hidden_act": "silu",
    "router_scaling_factor": 2.5,
    "mlp_bias": False,
}
# Where the attributes of transformers' config are not the block's own.
_OWN_CONFIGS = {
    "Dots3NoteVisionMoE": SimpleNamespace(per_layer_config=[SimpleNamespace(**_SIZES, **_PLAIN)]),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": SimpleNamespace(**_SIZES, **_PLAIN),
}


# The blocks around experts that stand alone.
_AROUND = {
    "PhimoeExperts": "PhimoeSparseMoeBlock",
    "ZayaExperts": "ZayaSparseMoeBlock",
    "InklingExperts": "InklingMoE",
}


class GemmaRouted(nn.Module):
    """Router and experts, called as the decoder layers of Gemma 4 do: with different inputs."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        _, weights, ids = self.router(flat)
        out: Tensor = self.experts(self.norm(flat), ids, weights)
        return out.view_as(x)


def tiny_block(family: Family) -> nn.Module:
    """A block of the family, made by transformers from a tiny config, with random weights."""
    modeling = import_module(family.modeling)
    kind = getattr(modeling, _AROUND.get(family.block, family.block))
    if family.routed is not None and family.block not in _AROUND:
        stem = family.block.removesuffix("Experts")
        config = next(_configs(family))
        routed = GemmaRouted(getattr(modeling, f"{stem}Router")(config), kind(config))
        randomize(routed)
        return routed
    errors = []
    own = _OWN_CONFIGS.get(family.block)
    for config in _configs(family) if own is None else [own]:
        for args in ((config,), (config, 0)):
            try:
                block: nn.Module = kind(*args)
            except (TypeError, AttributeError) as error:
                errors.append(repr(error))
                continue
            randomize(block)
            return block
    raise AssertionError(f"{family.block}: {errors}")


def _configs(family: Family) -> Iterator[Any]:
    """Configs of the family of transformers that have a number of experts, those of text first."""
    folder = family.modeling.rpartition(".")[0]
    found = vars(import_module(f"{folder}.configuration_{family.name}"))
    names = [n for n, c in found.items() if inspect.isclass(c) and c.__module__.startswith(folder)]
    stem = family.block.partition("Sparse")[0].removesuffix("MoE").removesuffix("Moe")
    stem = stem.removesuffix("Experts")
    for name in sorted(names, key=lambda n: (not n.startswith(stem), "Text" not in n, len(n))):
        config = found[name]()
        for key, value in {**_SIZES, **_OF_FAMILY.get(family.block, {})}.items():
            if hasattr(config, key):
                setattr(config, key, value)
        if hasattr(config, "ffn_config"):
            config.ffn_config.ffn_hidden_size, config.ffn_config.hidden_size = HIDDEN, DIM
            config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k = EXPERTS, TOP_K
        if any(hasattr(config, key) for key in ("hidden_size", "d_model")):
            yield config


def randomize(module: nn.Module, std: float = 0.5) -> None:
    """Values for all parameters and buffers, also where transformers begins with zeros."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=std)


class WideRouters(TorchFunctionMode):
    """float64 where transformers' blocks round to float32, so that what is left is arithmetic."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        name = getattr(func, "__name__", "")
        if name == "float":
            return args[0].double()
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **kwargs)
