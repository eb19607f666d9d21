"""What there is to swap in a model of transformers; and what stands in the way, told by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from spmd_moe.core.errors import ConfigError, plural
from spmd_moe.core.mesh import Axis
from spmd_moe.hf.block import LAYER, records_output
from spmd_moe.hf.element_map import FileTensor
from spmd_moe.hf.families import FAMILIES, UNSUPPORTED
from spmd_moe.hf.family import Family, Settings, attribute, held, read_block


@final
@dataclass(frozen=True, slots=True)
class FoundBlock:
    """A block of transformers in a model, and what is to stand in its place."""

    name: str
    module: nn.Module
    family: Family
    settings: Settings

    def ours(self, name: str) -> str:
        """The name in the swapped model of a parameter of the layer."""
        return f"{self.name}.{LAYER}.{name}"


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """What is refused, and why, and what to do."""

    what: str
    why: str
    fix: str


def find_blocks(model: nn.Module) -> list[FoundBlock] | Refusal:
    """Every MoE block, if all of them can be expressed."""
    if any("_orig_mod" in name.split(".") for name, _ in model.named_modules()):
        return Refusal(
            f"{type(model).__name__} is compiled, or a module in it",
            "compiled modules give their tensors other names than checkpoints have",
            "model = torch.compile(hf.swap(model, mesh))",
        )
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not type(module).__module__.startswith("transformers.models."):
            continue
        if kind in UNSUPPORTED:
            return _lacking(name, kind, UNSUPPORTED[kind])
        if kind not in FAMILIES:
            continue
        family = FAMILIES[kind].of_block(module)
        if hooked := _hooked(name, family, module):
            return hooked
        weight = attribute(module, family.weight)
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        parent = model.get_submodule(name.rpartition(".")[0])
        with naming(name, kind):
            settings = read_block(family, module, dtype, parent)
        if isinstance(settings, str):
            return _lacking(name, kind, settings)
        found.append(FoundBlock(name, module, family, settings))
    if quantized := getattr(getattr(model, "config", None), "quantization_config", None):
        return Refusal(
            f"the model is quantized: {type(quantized).__name__}",
            "the layer computes with weights as they are",
            "the checkpoint in bfloat16",
        )
    return found or _none_found(model)


@contextmanager
def naming(name: str, kind: str) -> Iterator[None]:
    """Put the block before what an error says of its settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"hf.swap: {name!r} is {kind}. {error}") from error


def uneven(found: Sequence[FoundBlock], ep: Axis) -> Refusal | None:
    """Refuse a block whose number of experts is not divisible by ep."""
    for each in found:
        experts = each.settings.router.num_experts
        if experts % ep.size:
            degree = max(d for d in range(1, ep.size) if experts % d == 0)
            return Refusal(
                f"{each.name!r} has {plural(experts, 'expert')}, for {ep}",
                "every rank of ep has the same number of experts",
                f"MoEMesh.init(..., ep={degree})",
            )
    return None


# Attention of transformers itself, which sees the tokens of one rank alone.
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def cut_sequences(model: nn.Module, cp: Axis) -> Refusal | None:
    """Refuse cp for a model whose attention would see a part of each sequence."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if cp.size == 1 or name not in _ATTENTION:
        return None
    return Refusal(
        f"the attention {name!r} of {type(model).__name__} does not support {cp}",
        "each rank of cp has a part of every sequence, and tokens would not see those of others",
        "MoEMesh.init(..., cp=1)",
    )


def _hooked(name: str, family: Family, block: nn.Module) -> Refusal | None:
    """Refuse a block with a module whose hook or own forward would not be called."""
    for inside, module in block.named_modules():
        if inside.partition(".")[0] in family.kept:
            continue  # it stays in the model
        hooks = [
            hook
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
            for hook in hooks.values()
            if not records_output(hook)
        ]
        if hooks or "forward" in vars(module):
            whose = f"{name}.{inside}".rstrip(".")
            return Refusal(
                f"{whose!r} has {'a hook' if hooks else 'its own forward'}",
                "the layer replaces the module and would not call it",
                "remove it before hf.swap, and register it on the swapped model",
            )
    return None


def _lacking(name: str, kind: str, missing: str) -> Refusal:
    return Refusal(
        f"{name!r} is {kind}, of which the layer cannot express: {missing}",
        "another computation in its place would be another model",
        "leave this model as it is; docs/hf_families.md lists what can be swapped",
    )


def _none_found(model: nn.Module) -> Refusal:
    experts = [n for n, m in model.named_modules() if "Experts" in type(m).__name__]
    kind = type(model.get_submodule(experts[0])).__name__ if experts else ""
    has = f"{experts[0]!r} is {kind}, of no family that is known" if experts else "it has no MoE"
    return Refusal(
        f"{type(model).__name__} has no block to swap: {has}",
        "a block is found by its class, which docs/hf_families.md lists",
        "a model of transformers with MoE blocks, such as Qwen3MoeForCausalLM",
    )


def memory_tensors(model: nn.Module, found: Sequence[FoundBlock]) -> list[FileTensor]:
    """Every parameter and persistent buffer of the model by transformers' names."""
    tensors, inside = [], set()
    for each in found:
        for tensor in held(each.family, each.module):
            key = f"{each.name}.{tensor.theirs}"
            inside.add(key)
            tensors.append(FileTensor(key, tuple(map(each.ours, tensor.ours)), tensor.dims))
    dropped = aliases(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in inside and name not in dropped:
            dims = tuple((dim,) for dim in range(tensor.ndim))
            tensors.append(FileTensor(name, (name,), dims))
    return tensors


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, each with the name that it is saved by."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            found[name] = first[id(tensor)]
    return found


def tensor_at(model: nn.Module, name: str) -> Tensor:
    found = attribute(model, name)
    assert isinstance(found, Tensor)
    return found


def ndims_and_experts(
    memory: Sequence[FileTensor], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, int]]:
    """Of each of our parameters the number of dims; of those of experts how many experts."""
    ndims, experts = {}, {}
    for tensor in memory:
        of_ours = 1 + max((d for group in tensor.dims for d in group), default=-1)
        for name in tensor.names:
            ndims[name] = of_ours
            if f".{LAYER}.experts." in name:
                experts[name] = tensors[tensor.key].shape[0]
    return ndims, experts
