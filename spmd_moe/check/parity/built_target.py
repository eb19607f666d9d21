"""A target called for one mesh: the module, its arguments, and what is said of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from spmd_moe.check.layouts import Layout
from spmd_moe.check.parity.axis_groups import Axes, MeshSizes, axes_of
from spmd_moe.check.target import CannotCheckError, Case, cannot
from spmd_moe.core.declare_placements import declarations
from spmd_moe.core.errors import PlacementError, short_dtype
from spmd_moe.core.mesh import MoEMesh

AnyTarget: TypeAlias = Callable[..., object]
AnyLayout: TypeAlias = MeshSizes | Layout
WHY = "a target builds a module and one call of it"
FIX = 'return Case(module, (x,), ("dp 0",))'


class RefusedError(Exception):
    """The target does not do this layout, and says why."""


@final
@dataclass(frozen=True, slots=True)
class Question:
    """One configuration of a target."""

    target: AnyTarget
    layout: AnyLayout
    tokens: int | None = None
    options: tuple[tuple[str, object], ...] = ()
    dtype: torch.dtype = torch.float64

    def alone(self) -> Question:
        """The same on one process, which has the tokens of all cells of dp and cp."""
        if isinstance(self.layout, MeshSizes):
            return dataclasses.replace(self, layout=self.layout.alone())
        cells = self.layout.dp * self.layout.cp
        tokens = None if self.tokens is None else self.tokens * cells
        return dataclasses.replace(self, layout=Layout(), tokens=tokens)

    def __str__(self) -> str:
        said = [str(self.layout)]
        if self.tokens is not None:
            said.append(f"{self.tokens} token{'' if self.tokens == 1 else 's'}")
        said += [f"{name} {value}" for name, value in self.options]
        if self.dtype != torch.float64:
            said.append(short_dtype(self.dtype))
        return ", ".join(said)


@final
@dataclass(slots=True)
class Setup:
    """What the target built, on one process or on a rank."""

    case: Case
    mesh: DeviceMesh | MoEMesh
    axes: Axes
    arguments: list[str] = field(default_factory=list)
    trainer: str | Callable[[nn.Module, Any], object] = "nothing"

    @property
    def module(self) -> nn.Module:
        return self.case.module

    def call(self, args: list[object]) -> object:
        return (self.case.call or self.module)(*args)

    def name(self, name: str) -> str:
        """The name of a parameter in the module of one process."""
        if self.case.names is not None:
            return self.case.names(name)
        parts = [p for p in name.split(".") if p not in ("_orig_mod", "_checkpoint_wrapped_module")]
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            parts = parts[1:]
        return ".".join(parts)

    def trainer_axes(self) -> tuple[str, list[str]]:
        """What a trainer in words does, and over which axes."""
        words = self.trainer.split() if isinstance(self.trainer, str) else []
        return (words[0], words[1:]) if words else ("hook", [])


def wants_moe_mesh(target: AnyTarget) -> bool:
    """By the annotation of its first argument; without one, a target that demands `tokens`."""
    taken = _parameters(target)
    if not taken:
        raise cannot("TARGET", "it takes no mesh", WHY, "def target(mesh): ...")
    first, *rest = taken
    if first.annotation is not inspect.Parameter.empty:
        return "MoEMesh" in str(first.annotation)
    return any(p.name == "tokens" and p.default is p.empty for p in rest)


def takes_tokens(target: AnyTarget) -> bool:
    positional = [p for p in _parameters(target) if p.kind is not p.KEYWORD_ONLY]
    return any(p.name == "tokens" for p in _parameters(target)) or (
        len(positional) > 1 and positional[1].default is inspect.Parameter.empty
    )


def _parameters(target: AnyTarget) -> list[inspect.Parameter]:
    return list(inspect.signature(target).parameters.values())


def prepare(question: Question) -> Setup:
    """Call the target; everything that is wrong with what it returns is said here."""
    layout = question.layout
    mesh: DeviceMesh | MoEMesh
    if isinstance(layout, MeshSizes):
        names, sizes = zip(*layout.sizes, strict=True)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    else:
        mesh = layout.mesh() if dist.is_initialized() else MoEMesh.single()
    options = dict(question.options)
    more = () if question.tokens is None else (question.tokens,)
    try:
        case = question.target(mesh, *more, **options)
    except CannotCheckError:
        raise
    except (ValueError, PlacementError) as error:
        raise RefusedError(str(error).splitlines()[0] or type(error).__name__) from error
    if not isinstance(case, Case):
        raise cannot("TARGET", f"it returns {type(case).__name__}, and not a Case", WHY, FIX)
    _check(case)
    setup = Setup(case, mesh, axes_of(layout).with_meshes((*case.meshes, *_meshes(case))))
    setup.arguments = _argument_names(case)
    setup.trainer = _trainer(case, mesh)
    kind, over = setup.trainer_axes()
    ready = {"nothing", "sum", "average", "fully_shard", "ours", "hook"}
    axes = list(setup.axes.groups)
    if kind not in ready or (kind in ("sum", "average", "fully_shard") and not over):
        have = f"there are {', '.join(sorted(ready - {'hook'}))}, and an axis after the first word"
        fix = f'trainer="sum {axes[0]}"'
        raise cannot("TARGET", f"there is no trainer {setup.trainer!r}", have, fix)
    unknown = [axis for axis in over if axis not in setup.axes]
    if unknown:
        have = f"{setup.trainer!r} names {unknown[0]!r}, which is no axis of the mesh"
        why = f"gradients are reduced over axes of the mesh, which has {', '.join(axes)}"
        fixes = [f'trainer="{kind} {axes[0]}"']
        if isinstance(layout, MeshSizes):  # the axes of a MoEMesh have fixed names
            fixes.append(f"--axes {','.join([*unknown, *axes])}   # or axes=... in Python")
        raise cannot("TARGET", have, why, *fixes)
    return setup


def _check(case: Case) -> None:
    named = (*case.module.named_parameters(), *case.module.named_buffers(), *enumerate(case.args))
    for name, t in named:
        if isinstance(t, Tensor) and t.device.type not in ("cpu", "meta"):
            what = f"{name} lies on {t.device}, and parity runs on the CPU"
            raise cannot("TARGET", what, "it runs on machines without a GPU", "device='cpu'")
        if isinstance(t, Tensor) and t.device.type == "meta":
            what = f"{name} lies on the meta device and has no values"
            raise cannot("TARGET", what, "parity compares numbers", "module.to_empty(device='cpu')")
    if not any(isinstance(arg, Tensor) for arg in case.args):
        raise cannot("TARGET", "none of the arguments it builds is a tensor", WHY, FIX)
    if len(case.placements) > len(case.args):
        what = f"{len(case.placements)} placements are given for {len(case.args)} arguments"
        raise cannot("TARGET", what, WHY, FIX)


def _meshes(case: Case) -> list[DeviceMesh]:
    """Of the DTensors that the module has."""
    tensors = (*case.module.parameters(), *case.module.buffers())
    return list(
        {id(t.device_mesh): t.device_mesh for t in tensors if isinstance(t, DTensor)}.values()
    )


def _argument_names(case: Case) -> list[str]:
    called = case.call or case.module.forward
    try:
        names = list(inspect.signature(called).parameters)
    except (TypeError, ValueError):
        names = []
    return [*names, *(f"argument {n}" for n in range(len(names), len(case.args)))]


def _trainer(case: Case, mesh: DeviceMesh | MoEMesh) -> str | Callable[[nn.Module, Any], object]:
    if case.trainer is not None:
        return case.trainer
    declared = declarations(case.module)
    ours = isinstance(mesh, MoEMesh) and declared and None not in declared.values()
    return "ours" if ours else "nothing"


def whole_arguments(setup: Setup, dtype: torch.dtype) -> list[object]:
    """The arguments on one process."""
    found: list[object] = []
    for arg in setup.case.args:
        if isinstance(arg, Tensor):
            arg = arg.full_tensor() if isinstance(arg, DTensor) else arg
            arg = arg.detach().clone()
            arg = arg.to(dtype) if arg.is_floating_point() else arg
        found.append(arg)
    return found


def tensors_of(module: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return cast(
        Mapping[str, Tensor], dict(module.named_parameters()) | dict(module.named_buffers())
    )
