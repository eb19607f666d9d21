"""Declarations compared with the parameters and buffers that exist (X9).

A class declares its own parameters, and `declare_placements` declares others by name. A
misspelt name leaves a tensor without a type and a type without a tensor; both are findings.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spmd_moe.check.findings import Finding, finding
from spmd_moe.check.signatures import presentation, readable
from spmd_moe.core.declare_placements import declarations, declared
from spmd_moe.core.errors import describe
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import Placement, annotations_of, completed

WHY = "what has no placement is not checked, and its gradient is not reduced"


def declared_types(module: nn.Module) -> dict[str, tuple[Tensor, Placement]]:
    """Each tensor that its class or `declare_placements` declares, under its name."""
    found = {}
    for prefix, part in module.named_modules():
        for name, placement in declared(part).items():
            tensor = getattr(part, name, None)
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                found[f"{prefix}.{name}".removeprefix(".")] = (tensor, placement)
    return found


def misdeclared(module: nn.Module, mesh: MoEMesh) -> Iterator[Finding]:
    """Declarations without a tensor, tensors without a declaration, and incomplete declarations."""
    for prefix, part in module.named_modules():
        yield from _named_nothing(prefix, part)
    for name, placement in declarations(module, persistent=False).items():
        tensor = _at(module, name)
        if placement is None and not isinstance(tensor, DTensor):
            yield _undeclared(module, name, tensor)
    for name, (tensor, placement) in declared_types(module).items():
        missing = unsaid(placement, mesh)
        if missing:
            what = f"{name} {describe(tensor)} is declared {placement}, and nothing on {missing}"
            fix = completed(placement, presentation(placement))
            yield finding("X9", name, type(module).__name__, what, WHY, fix)


def unsaid(placement: Placement, mesh: MoEMesh) -> str:
    """The axes of more than one rank that a placement does not mention."""
    roles = (r for r in presentation(placement) if r not in placement and mesh[r].size > 1)
    return ", ".join(mesh[role].name for role in roles)


def _named_nothing(prefix: str, part: nn.Module) -> Iterator[Finding]:
    kind = type(part)
    if not kind.__module__.startswith("torch."):  # torch's own name what is not there
        for name, written in annotations_of(kind)[1].items():
            readable(getattr(part, name, None), name, written, kind)
    for name, placement in declared(part).items():
        value = getattr(part, name, part)
        if value is None or isinstance(value, Tensor):
            continue
        what = "there is no such attribute" if value is part else "that attribute is no tensor"
        there = [n for n, _ in (*part.named_parameters(recurse=False), *part.named_buffers())]
        yield finding(
            "X9",
            f"{prefix}.{name}".removeprefix("."),
            kind.__name__,
            f"{name!r} is declared {placement}, but {what}",
            "a declaration of nothing is a misspelt one, and what was meant has none",
            *(f"{n}: Placed[...]" for n in there[:3]),
        )


def _undeclared(module: nn.Module, name: str, tensor: Tensor) -> Finding:
    prefix, _, own = name.rpartition(".")
    kind = type(module.get_submodule(prefix)).__name__
    return finding(
        "X9",
        name,
        kind,
        f"{own!r} {describe(tensor)} has no declared placement",
        WHY,
        f"{own}: Placed[Tensor, DP[R], CP[R], TP[I]]   # in the body of {kind}, if it is yours",
        f"declare_placements(module, {{{name!r}: ...}})   # in the target, if it is not",
    )


def _at(module: nn.Module, name: str) -> Tensor:
    prefix, _, own = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(prefix), own)
    return tensor
