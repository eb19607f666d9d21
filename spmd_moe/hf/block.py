"""The module that replaces transformers' block: our layer with the same call interface."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from spmd_moe.core.placement import TP, S
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.hf.family import Family, attribute
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.router import Routing

LAYER = "moe"  # the name of the layer in a block


def block_of(moe: MoE, family: Family, theirs: nn.Module) -> nn.Module:
    """The module that replaces `theirs`."""
    if family.routed is not None:
        return ExpertsBlock(moe)
    kept = {name: theirs.get_submodule(name) for name in family.kept}
    gate: nn.Module = attribute(theirs, family.gate)
    block = Block(moe, family, kept, type(gate))
    for hook in filter(records_output, gate._forward_hooks.values()):
        block.router_logits.register_forward_hook(hook)  # transformers registers them once
    return block


def records_output(hook: object) -> bool:
    """Whether a hook is one with which transformers records the outputs of routers."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


@final
class ExpertsBlock(nn.Module):
    """The layer as a replacement for transformers' experts, called with their router's choices."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = self.moe(hidden_states, expert_ids=top_k_index, expert_weights=top_k_weights)
        return out.hidden


@final
class Block(nn.Module):
    """The layer with the arguments and results of transformers' block."""

    def __init__(self, moe: MoE, family: Family, kept: Mapping[str, nn.Module], gate: type) -> None:
        super().__init__()
        self.moe, self.pair = moe, family.returns == "pair"
        self.before, self.after, self.beside = family.before, family.after, family.beside
        for name, module in kept.items():
            self.add_module(name, module)
        self.router_logits = _router_logits(gate)()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        inner = hidden_states
        for name in self.before:
            inner = self.get_submodule(name)(inner)
        hidden = self._routed(inner, hidden_states if self.before else None)
        for name in self.after:
            hidden = self.get_submodule(name)(hidden)
        for name in self.beside:
            hidden = hidden + self.get_submodule(name)(hidden_states)
        return (hidden, None) if self.pair else hidden

    def _routed(self, inner: Tensor, router_input: Tensor | None) -> Tensor:
        """The output of the layer; if router logits are recorded, they are passed on."""
        if not self.router_logits._forward_hooks:
            return self.moe(inner, router_input=router_input).hidden
        pass_on = partial(self._pass_on_logits, math.prod(inner.shape[:-1]))
        handle = self.moe.router.register_forward_hook(pass_on)  # for this call: it has its rows
        try:
            return self.moe(inner, router_input=router_input).hidden
        finally:
            handle.remove()

    def _pass_on_logits(self, rows: int, module: nn.Module, args: Any, routing: Routing) -> None:
        logits_TE, tp, kind = routing.logits_TE, self.moe.mesh[TP], self.moe.config.dst
        if kind != S(0):  # inside the layer each rank of tp has different rows
            shape = ShardShape.even(rows, tp.size)
            logits_TE = redistribute(logits_TE, tp, src=S(0), dst=kind, shape=shape)
        self.router_logits(logits_TE)


def _router_logits(gate: type) -> type[nn.Module]:
    """A module without parameters that transformers takes for its router, to record its output."""

    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)

    def forward(self: nn.Module, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return logits_TE, logits_TE  # any of a router's outputs may be recorded

    methods = {"__init__": init, "forward": forward, "__module__": __name__}
    return type("RouterLogits", (gate,), methods)
