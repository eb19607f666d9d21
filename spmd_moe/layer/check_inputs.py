"""Does what the layer is given in a call fit it? Told before any token is sent."""

# Shape letters in this file:
#   D  model dim    E  experts    e  experts on this rank
#   F  hidden dim of an expert, on this rank

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spmd_moe.core.compute_dtype import dtypes_match
from spmd_moe.core.errors import (
    DtypeError,
    GradientError,
    ShapeError,
    SpmdMoeError,
    describe,
    explain,
    plural,
    short_dtype,
)
from spmd_moe.core.torch_modes import fsdp_casts, function_transform, is_dtensor
from spmd_moe.core.validate import check_instance
from spmd_moe.layer.experts import Experts
from spmd_moe.layer.router import Router


class Beside(NamedTuple):
    """Optional arguments of a call, beside the tokens."""

    mask: Tensor | None
    expert_ids: Tensor | None
    expert_weights: Tensor | None
    router_input: Tensor | None


def check_inputs(x: Tensor, beside: Beside, dim: int, router: Router, experts: Experts) -> None:
    """Where all is well, a few comparisons."""
    check_instance("MoE.forward", "x", x, Tensor, "torch.as_tensor(x)   # [B, L, D] or [T, D]")
    transform = function_transform(chain((x,), router.parameters(), experts.parameters()))
    if transform is not None:
        raise _transformed(transform)
    _check_plain("x", x)
    if x.ndim not in (2, 3):
        _refuse_dims(x, dim)
    if x.shape[-1] != dim:
        _refuse(
            f"x {describe(x)} does not end in the layer's dim {dim}",
            "x is [B, L, D] or [T, D]",
            f"MoEConfig(dim={x.shape[-1]}, ...)   # a layer for such tokens",
            f"nn.Linear({x.shape[-1]}, {dim})(x)   # tokens for this layer",
        )
    _check_all_beside(beside, x, router)
    device = experts.w1_eFD.device
    if x.device != device:
        _refuse(
            f"x is on {x.device} and the layer on {device}",
            "they meet in a product",
            f"x.to({str(device)!r})",
            f"layer.to({str(x.device)!r})",
        )
    if not dtypes_match(x, experts.w1_eFD):
        _refuse_dtype(x, experts)


def _check_all_beside(beside: Beside, x: Tensor, router: Router) -> None:
    config, lead = router.config, x.shape[:-1]
    if beside.mask is not None:
        why = "it has one bool for each token"
        _check_beside("mask", beside.mask, x, lead, torch.bool, why)
    if beside.expert_ids is not None:
        why = f"each token has {config.top_k} ids"
        _check_beside("expert_ids", beside.expert_ids, x, (*lead, config.top_k), torch.int64, why)
    asked = {"expert_ids": config.given, "expert_weights": config.given}
    asked["router_input"] = config.input_dim is not None
    for name, wanted in asked.items():
        if wanted and getattr(beside, name) is None:
            setting = f"input_dim={config.input_dim}" if name == "router_input" else "given=True"
            _refuse(
                f"{name} is not given",
                f"the layer has RouterConfig({setting}, ...)",
                f"layer(x, {name}={name})",
            )
    for name in ("expert_weights", "router_input"):
        given = getattr(beside, name)
        if given is not None and not asked[name]:
            setting = "given=True" if name == "expert_weights" else f"input_dim={given.shape[-1]}"
            _refuse(
                f"{name} is given, but the layer's router does not read it",
                "the parameters of the router and their width are settings of the layer",
                f"RouterConfig({setting}, ...)",
            )
    if beside.expert_weights is not None:
        weights, why = beside.expert_weights, f"each token has {config.top_k} weights"
        fix = "torch.as_tensor(expert_weights)"
        check_instance("MoE.forward", "expert_weights", weights, Tensor, fix)
        dtype = weights.dtype if weights.is_floating_point() else x.dtype
        _check_beside("expert_weights", weights, x, (*lead, config.top_k), dtype, why)
    if beside.router_input is not None and config.input_dim is not None:
        why, shape = "the router reads it instead of x", (*lead, config.input_dim)
        _check_beside("router_input", beside.router_input, x, shape, x.dtype, why)


def _transformed(transform: str) -> GradientError:
    return GradientError(
        explain(
            "MoE.forward",
            f"it is called under {transform}; the layer has derivatives by torch.autograd alone",
            why="its backward is written by hand, and it reads numbers of rows on the host",
            fixes=[
                "torch.autograd.grad(y, x, v, create_graph=True)   # and again: any order",
                "torch.autograd.functional.hvp(f, x, v)   # hessian, vhp, jacobian",
                "layer(x.flatten(0, -2))   # for torch.vmap: a batch is more tokens",
            ],
        )
    )


def _check_plain(name: str, given: Tensor) -> None:
    if is_dtensor(given):
        _refuse(
            f"{name} is a DTensor; it must be this rank's own tensor",
            "what it holds on tp is said by the layer's src, and nowhere else",
            f"{name}.to_local()",
        )
    if given.layout is not torch.strided:
        _refuse(
            f"{name} has the layout {given.layout}; it must be torch.strided",
            "rows are sent as they lie in memory",
            f"{name}.to_dense()",
        )


def _refuse_dims(x: Tensor, dim: int) -> None:
    if x.ndim > 3:
        fix = "x.flatten(1, -2)   # [B, L, D]"
    elif x.ndim == 1 and x.shape[0] == dim:
        fix = "x.unsqueeze(0)   # one token"
    else:
        fix = f"x.view(-1, {dim})"
    _refuse(
        f"x {describe(x)} has {plural(x.ndim, 'dim')}",
        "x is [B, L, D] or [T, D]",
        fix,
    )


def _check_beside(
    name: str, given: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, why: str
) -> None:
    """Something that goes with x, token by token."""
    check_instance("MoE.forward", name, given, Tensor, f"torch.as_tensor({name}, dtype={dtype})")
    _check_plain(name, given)
    if given.shape != shape:
        _refuse(
            f"{name} {describe(given)} does not fit x {describe(x)}",
            why,
            f"a {dtype} tensor of shape {list(shape)}",
        )
    if given.dtype is not dtype:
        _refuse(
            f"{name} is {describe(given)}; it must be {dtype}",
            why,
            f"{name}.to({dtype})",
            error=DtypeError,
        )
    if given.device != x.device:
        _refuse(
            f"{name} is on {given.device} and x on {x.device}",
            "they go together",
            f"{name}.to({str(x.device)!r})",
        )


def _refuse_dtype(x: Tensor, experts: Experts) -> None:
    """The experts compare them too; this check raises before anything is sent.

    Not of weights that are something else until the experts run, and may be cast then.
    """
    w1_eFD = experts.w1_eFD
    known = type(w1_eFD) is nn.Parameter or is_dtensor(w1_eFD)
    if known and not fsdp_casts(experts):
        weights_can = x.dtype.is_floating_point and x.dtype.itemsize > 1
        _refuse(
            f"x is {describe(x)}, the layer {short_dtype(w1_eFD.dtype)}",
            "an implicit cast would change the precision of the layer",
            *([f"layer.to({x.dtype})"] if weights_can else []),
            f"x.to({w1_eFD.dtype})",
            error=DtypeError,
        )


def _refuse(what: str, why: str, *fixes: str, error: type[SpmdMoeError] = ShapeError) -> None:
    raise error(explain("MoE.forward", what, why=why, fixes=fixes))
