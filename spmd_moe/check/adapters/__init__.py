"""Ready targets for the MoE blocks of frameworks, as they are; nothing is imported unless used."""

from __future__ import annotations

from collections.abc import Callable

from spmd_moe.check.adapters.deepspeed_moe import deepspeed_target
from spmd_moe.check.adapters.megatron_moe import megatron_target
from spmd_moe.check.adapters.torchtitan_moe import torchtitan_target
from spmd_moe.check.adapters.transformers_blocks import transformers_target
from spmd_moe.check.parity.built_target import AnyTarget
from spmd_moe.check.target import cannot

# By the first word of FRAMEWORK:NAME; given are the name, the plan, and a directory to import from.
ADAPTERS: dict[str, Callable[[str, str | None, str | None], AnyTarget]] = {
    "transformers": transformers_target,
    "torchtitan": torchtitan_target,
    "deepspeed": deepspeed_target,
    "megatron": megatron_target,
}


def adapted(name: str, plan: str | None = None, path: str | None = None) -> AnyTarget:
    """The target of a framework's block: `adapted("transformers:mixtral", "all_to_all")`."""
    framework, _, block = name.partition(":")
    if framework not in ADAPTERS or not block:
        have = f"there are {', '.join(ADAPTERS)}"
        raise cannot("TARGET", f"{name!r} is no framework's block", have, "transformers:mixtral")
    return ADAPTERS[framework](block, plan, path)
