"""Selection bias, also called expert bias: steers the choice towards underused experts."""

# Shape letters in this file:
#   T  tokens on this rank    D  model width    E  experts    L  layers

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from spmd_moe.core.autograd_function import apply
from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE, Tokens, TokenSums, Whole
from spmd_moe.core.spmd_types_compat import rules
from spmd_moe.core.validate import check_number, describe_value
from spmd_moe.layer.balance_losses import sum_over
from spmd_moe.layer.router import Router


class _CountInBackward(torch.autograd.Function):
    """Nothing in forward; backward adds the counts to the counter.

    A forward may run twice (recomputation), or for its value only (evaluation). The backward of
    what a step trains on runs once, so counting there is exact without knowing any of that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts_E: Tensor, seen_E: Tensor) -> Tensor:
        ctx.counts = counts_E, seen_E
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.counts is not None:  # None in another backward of the same forward
            counts_E, seen_E = ctx.counts
            seen_E += counts_E
            ctx.counts = None
        return grad, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, counts_E: Tensor, seen_E: Tensor) -> object:
        rules.ignore(counts_E, seen_E)
        return rules.einsum("...->...", x)


def count_in_backward(x_TD: Tokens, counts_E: Tokens, seen_E: TokenSums) -> Tokens:
    """`x_TD`, whose backward adds `counts_E` to the counter `seen_E`, once for each step."""
    return apply(_CountInBackward, x_TD, counts_E, seen_E)


@torch.no_grad()
def update_selection_bias(routers: Iterable[Router], mesh: MoEMesh, rate: float) -> None:
    """Move the selection bias of each router towards the experts that were chosen too rarely.

    Call it after each optimizer step, on every rank. It reduces the counts of all routers in one
    collective and resets them. Also known as aux-loss-free balancing, or `expert_bias`.

    Args:
        routers: The routers, such as `[layer.router]`.
        mesh: The mesh of the layers.
        rate: The step of the bias; a common value is 0.001.

    Raises:
        ConfigError: `rate` is not a number, or an item is not a router.

    Example:
        >>> import torch
        >>> from spmd_moe import update_selection_bias
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> layer(torch.ones(3, 8)).hidden.sum().backward()
        >>> update_selection_bias([layer.router], mesh, rate=0.001)
        >>> bool(layer.router.bias_E.abs().max() > 0)
        True
    """
    routers = _routers(routers)
    check_number(
        "update_selection_bias",
        "rate",
        rate,
        math.isfinite,
        need="a finite number",
        why="it is what the bias of an expert moves by",
        fix="rate=0.001",
    )
    if not routers:
        return
    counted_LE: TokenSums = torch.stack([router.seen_E for router in routers])
    summed_LE: Whole = sum_over(counted_LE, [mesh[role] for role in DENSE])
    seen_LE = summed_LE.to(torch.float64)
    push_LE = rate * torch.sign(seen_LE.mean(1, keepdim=True) - seen_LE)
    for router, push_E in zip(routers, push_LE, strict=True):
        router.bias_E += push_E.to(router.bias_E.dtype)
        router.seen_E *= 0  # what each rank has stays a part of a sum: 0 is one too


def _routers(given: object) -> list[Router]:
    """What is given, if it is routers: not a layer, nor one router that is in no list."""
    routers = list(given) if isinstance(given, Iterable) else []
    # Not by class: one that is compiled is of another class.
    wrong = [router for router in routers if not hasattr(router, "seen_E")]
    if wrong or not isinstance(given, Iterable):
        raise ConfigError(
            explain(
                "update_selection_bias",
                f"{describe_value(wrong[0] if wrong else given)} is given; "
                "it must be a list of routers",
                why="the counts of all layers are summed over the ranks at once",
                fixes=["update_selection_bias([layer.router for layer in layers], mesh, rate)"],
            )
        )
    return routers
