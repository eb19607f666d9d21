"""A target run on all ranks of a layout, each a thread with real values, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from spmd_moe.check.layouts import Layout
from spmd_moe.check.target import Target
from spmd_moe.check.thread_ranks import RanksError, threaded
from spmd_moe.core.placement import placements_of
from tests.support.layer_layouts import gradient, meaning

PATIENCE = 60.0  # seconds after which ranks that wait for each other are said to hang


def outcome(
    target: Target, layout: Layout, tokens: int, patience: float = PATIENCE
) -> dict[str, Tensor] | str:
    """What all ranks compute, each gradient as its declared kind reads it; or how it fails."""
    try:
        ranks = threaded(layout.world, _run, target, layout, tokens, seconds=patience)
        return _together(ranks, layout)
    except RanksError as error:
        return "hang" if error.stuck else f"crash: {str(error).strip().splitlines()[-1]}"
    except AssertionError as error:
        return f"ranks differ: {error}"


Ran = tuple[dict[str, Tensor], dict[str, tuple[Tensor, Any]]]


def _run(target: Target, layout: Layout, tokens: int) -> Ran:
    """Outputs, gradients of inputs and buffers as they are; gradients with their placements."""
    mesh = layout.mesh()
    built = target(mesh, tokens)
    args = [_leaf(arg) for arg in built.args]
    out = built.module(*args)
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    roots = [t for t in results if t.requires_grad]
    dist.barrier()
    if roots:
        torch.autograd.backward(roots, [_upstream(t) for t in roots])
    found = {f"output {n}": _plain(t) for n, t in enumerate(results)}
    grads = ((f"gradient of input {n}", a) for n, a in enumerate(args) if isinstance(a, Tensor))
    found |= {name: _plain(a.grad) for name, a in grads if a.grad is not None}
    found |= {f"buffer {name}": b.clone() for name, b in built.module.named_buffers()}
    owed = {}
    for prefix, part in built.module.named_modules():
        declared = placements_of(type(part))
        for name, p in part.named_parameters(recurse=False):
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            owed[f"gradient of {prefix}.{name}"] = (_plain(grad), declared.get(name))
    return found, owed


def _leaf(arg: object) -> object:
    if isinstance(arg, Tensor) and arg.is_floating_point():
        return arg.detach().requires_grad_()
    return arg


def _upstream(t: Tensor) -> Tensor:
    """A gradient that depends on the place, and is the same on ranks that have the same."""
    if isinstance(t, DTensor):
        return torch.ones_like(t)
    return torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view_as(t)


def _plain(t: Tensor) -> Tensor:
    return (t.to_local() if isinstance(t, DTensor) else t).detach().clone()


def _together(ranks: list[Ran], layout: Layout) -> dict[str, Tensor]:
    found = {f"{k} of rank {r}": t for r, (own, _) in enumerate(ranks) for k, t in own.items()}
    for name, (_, placement) in ranks[0][1].items():
        by_rank = [owed[name][0] for _, owed in ranks]
        if placement is None:
            found |= {f"{name} of rank {r}": t for r, t in enumerate(by_rank)}
        else:
            found[name] = meaning(by_rank, gradient(placement), layout)
    return found


def differs(got: dict[str, Tensor] | str, want: dict[str, Tensor] | str) -> str:
    """What went wrong, in a word; empty where nothing did."""
    if isinstance(got, str) or isinstance(want, str):
        return "" if got == want else str(got)
    for name in sorted(want.keys() | got.keys()):
        if name not in got or name not in want:
            return f"values: {name} is not on both sides"
        a, b = got[name], want[name]
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), 1e-3, 1e-5, True):
            return f"values: {name}"
    return ""
