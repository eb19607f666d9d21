"""What is checked: a function that builds a module and one call of it, for a given mesh.

    def target(mesh: MoEMesh, tokens: int) -> Case:
        layer = MyLayer(mesh)
        return Case(layer, (torch.randn(tokens, 64),), (Placed[Tensor, DP[V], CP[V], TP[R]],))

`tokens` is how many tokens a cell of dp and cp has; what of them this rank holds is the target's to
say, as it is in the program that the layer is for. `Case` gives each tensor argument the placement
that it has when it comes; parameters and buffers are declared by their classes. A layout that the
module cannot do is refused with a ValueError.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast, final

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spmd_moe.core.errors import ConfigError, PlacementError, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import Placement, placement_of


@final
@dataclass(frozen=True, slots=True)
class Case:
    """A module, the arguments of one call, and the placement of each argument that is a tensor."""

    module: nn.Module
    args: tuple[object, ...]
    placements: tuple[object, ...] = ()  # annotations or Placements; None for what needs none

    def tensors(self) -> list[tuple[Tensor, Placement]]:
        """The tensor arguments, each with its placement. DTensors know their own."""
        found = []
        if len(self.placements) > len(self.args):
            what = f"{len(self.placements)} placements are given for {len(self.args)} arguments"
            why = "a placement of nothing is one that something else should have"
            raise cannot("Case", what, why, "None   # the placement of what is no tensor")
        given = (*self.placements, *[None] * (len(self.args) - len(self.placements)))
        for number, (arg, annotation) in enumerate(zip(self.args, given, strict=True)):
            if not isinstance(arg, Tensor) or isinstance(arg, DTensor):
                continue
            is_placement = isinstance(annotation, Placement)
            placement = annotation if is_placement else placement_of(annotation)
            if placement is None:
                raise CannotCheckError(
                    explain(
                        "Case",
                        f"argument {number} is a tensor without a placement",
                        why="the check follows placements, and has to start from one",
                        fixes=["Case(module, (x,), (Placed[Tensor, DP[V], CP[V], TP[S[0]]],))"],
                    )
                )
            found.append((arg, cast(Placement, placement)))
        return found


class Target(Protocol):
    def __call__(self, mesh: MoEMesh, tokens: int, /) -> Case: ...


class CannotCheckError(ConfigError):
    """The target or the question is not one that the checker could answer."""


def cannot(where: str, what: str, why: str, *fixes: str) -> CannotCheckError:
    return CannotCheckError(explain(where, what, why=why, fixes=fixes))


def load(name: str) -> Target:
    """The target that `package.module:callable` names; modules of this directory are found too."""
    module_name, _, attribute = name.partition(":")
    why = "a target is a callable (mesh, tokens) -> Case in a module that can be imported"
    if not module_name or not attribute:
        what = f"{name!r} does not have the form package.module:callable"
        raise cannot("TARGET", what, why, "my_package.my_module:target")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        what = f"{module_name!r} cannot be imported: {type(error).__name__}: {error}"
        raise cannot(
            "TARGET", what, why, f"python -c 'import {module_name}'   # must work"
        ) from error
    target: object = module
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module_name]
        there = [n for n in own if callable(vars(module)[n]) and not n.startswith("_")]
        what = f"{module_name!r} has no callable {attribute!r}"
        raise cannot("TARGET", what, why, *(f"{module_name}:{n}" for n in there[:3]))
    return cast(Target, target)


def build(target: Target, mesh: MoEMesh, tokens: int) -> Case:
    """What the target builds, once it is known to be something that can be checked."""
    why = "a target builds a module and one call of it: Case(module, args, placements)"
    fix = "return Case(layer, (x,), (Tokens,))"
    try:
        built: object = target(mesh, tokens)
    except (ValueError, PlacementError):
        raise  # a refusal, or a wrong declaration
    except Exception as error:
        what = f"it raises {type(error).__name__} for {mesh} and {tokens} tokens: {error}"
        raise cannot(
            "TARGET", what, why, "raise ValueError   # where a layout is refused"
        ) from error
    if not isinstance(built, Case):
        raise cannot("TARGET", f"it returns {type(built).__name__}, not Case", why, fix)
    if not any(isinstance(arg, Tensor) for arg in built.args):
        raise cannot("TARGET", "none of the arguments it builds is a tensor", why, fix)
    for name, t in (*built.module.named_parameters(), *enumerate(built.args)):
        if isinstance(t, Tensor) and t.device.type != "cpu":
            what = f"{name} lies on {t.device}, and the check runs on the CPU"
            raise cannot("TARGET", what, "it runs on machines without a GPU", "device='cpu'")
    return built
