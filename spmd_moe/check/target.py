"""Targets: a function that builds a module and one call of it, for a given mesh.

    def target(mesh: MoEMesh, tokens: int) -> Case:
        layer = MyLayer(mesh)
        return Case(layer, (torch.randn(tokens, 64),), (Placed[Tensor, DP[V], CP[V], TP[R]],))

`tokens` is how many tokens a cell of dp and cp has; which of them this rank holds is for the target
to say, as in the program that the layer is for. `Case` gives each tensor argument its placement;
parameters and buffers are declared by their classes. A layout that the module cannot do is refused
with a ValueError.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Protocol, cast, final

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from spmd_moe.core.errors import ConfigError, PlacementError, SpmdMoeError, describe, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.messages import COMMAND_LINE as COMMAND_LINE
from spmd_moe.core.messages import PACKAGE, at_line, is_users, one_line, plural, short_path
from spmd_moe.core.placement import Placement, placement_of

_CASE = "Case(module, (x,), (Placed[Tensor, DP[V], CP[V], TP[S[0]]],))"


class CannotCheckError(ConfigError):
    """The target or the question is not one that the checker could answer."""


class CheckerError(SpmdMoeError, RuntimeError):
    """The checker itself failed; nothing is said of the module."""


def cannot(where: str, what: str, why: str, *fixes: str, at: str | None = None) -> CannotCheckError:
    return CannotCheckError(explain(where, what, why=why, fixes=fixes, at=at))


@final
@dataclass(frozen=True, slots=True)
class Case:
    """A module, the arguments of one call, and the placement of each argument that is a tensor.

    Args:
        module: The module, parallel in its own way.
        args: The arguments of one call. An argument with a placement in words is the whole, the
            same on every rank, and `parity` shards it; any other is what this rank holds.
        placements: For each argument an annotation, a `Placement`, words (`"dp 0, tp 1"`), or None.

    What follows is read by `parity` alone.

    Args:
        call: What is called with the arguments; default: `module`.
        out: How the output lies over the ranks, in words; for several outputs, words by name, in
            which `*` stands for anything. Default: read from DTensors, else from shapes.
        weights: Words for parameters and buffers that do not tell themselves, by name or pattern.
        trainer: What happens to gradients after backward: `"nothing"`, `"sum dp"`, `"average dp"`,
            `"fully_shard dp"`, `"ours"` (`reduce_gradients`), or a function of module and mesh.
            Default: `"ours"` if the module declares all parameters for a MoEMesh, else nothing.
        names: The name in the module of one process for each name in this rank's module.
        meshes: Further meshes of the same ranks whose axes are named in words.
        optimizer: Makes the optimizer from the parameters; default: SGD.
    """

    module: nn.Module
    args: tuple[object, ...]
    placements: tuple[object, ...] = ()  # annotations or Placements; None for what needs none
    call: Callable[..., object] | None = None
    out: str | Mapping[str, str] | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    trainer: str | Callable[[nn.Module, Any], object] | None = None
    names: Callable[[str], str] | None = None
    meshes: tuple[DeviceMesh, ...] = ()
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None

    def __post_init__(self) -> None:
        module: object = self.module
        if not isinstance(module, nn.Module):
            what = f"module is of type {type(module).__name__}, not an nn.Module"
            raise cannot("Case", what, "the check runs a module", _CASE)
        for name in ("args", "placements"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                kind = describe(value) if isinstance(value, Tensor) else repr(type(value).__name__)
                why = "a tuple of one needs its comma: (x,)"
                raise cannot("Case", f"{name} is {kind}, not a tuple", why, _CASE)

    def tensors(self) -> list[tuple[Tensor, Placement]]:
        """The tensor arguments, each with its placement. DTensors know their own."""
        found = []
        if len(self.placements) > len(self.args):
            have = plural(len(self.placements), "placement")
            what = f"{have} for {plural(len(self.args), 'argument')}"
            why = "each placement belongs to the argument at the same position"
            raise cannot("Case", what, why, "None   # as the placement of what is no tensor")
        given = (*self.placements, *[None] * (len(self.args) - len(self.placements)))
        for number, (arg, annotation) in enumerate(zip(self.args, given, strict=True)):
            if not isinstance(arg, Tensor) or isinstance(arg, DTensor):
                continue
            if isinstance(annotation, str):
                what = f"the placement of argument {number} is in words"
                why = "the traced check follows types; spmd-moe parity reads words"
                fix = "Case(module, (x,), (Placed[Tensor, DP[V], CP[V], TP[S[0]]],))"
                raise cannot("Case", what, why, fix)
            is_placement = isinstance(annotation, Placement)
            placement = annotation if is_placement else placement_of(annotation)
            if placement is None:
                what = f"argument {number} is a tensor without a placement"
                why = "the check follows placements, and has to start from one"
                raise cannot("Case", what, why, _CASE)
            found.append((arg, cast(Placement, placement)))
        return found


class Target(Protocol):
    def __call__(self, mesh: MoEMesh, tokens: int, /) -> Case: ...


def build(target: Target, mesh: MoEMesh, tokens: int) -> Case:
    """What the target builds, once it is known to be something that can be checked."""
    at = line_of(target)
    why = "a target builds a module and one call of it: Case(module, args, placements)"
    fix = "return Case(layer, (x,), (Tokens,))"
    _check_arguments(target, at)
    try:
        built: object = target(mesh, tokens)
    except (ValueError, PlacementError):
        raise  # a refusal, or a wrong declaration
    except Exception as error:
        when = f"for {mesh} and {plural(tokens, 'token')}"
        what = f"it raises {type(error).__name__} {when}: {one_line(error)}"
        fix, at = "raise ValueError   # where a layout is refused", line_of_error(error) or at
        if isinstance(error, AttributeError) and isinstance(error.obj, MoEMesh):
            why = "check and plan pass a MoEMesh; a target of a DeviceMesh is for spmd-moe parity"
            fix = "mesh[TP].group   # also .rank and .size; from spmd_moe import TP"
        raise cannot("TARGET", what, why, fix, at=at) from error
    if callable(built) and not isinstance(built, nn.Module):
        what = "it returns a function, not a Case: it makes targets, and is none"
        fix = "my_target = make_target(...)   # in its module; check my_target"
        raise cannot("TARGET", what, why, fix, at=at)
    if type(built) is not Case:  # a mock can pass isinstance
        raise cannot("TARGET", f"it returns {type(built).__name__}, not Case", why, fix, at=at)
    if not any(isinstance(arg, Tensor) for arg in built.args):
        raise cannot("TARGET", "none of the arguments it builds is a tensor", why, fix, at=at)
    for name, t in (*built.module.named_parameters(), *enumerate(built.args)):
        if isinstance(t, Tensor) and t.device.type != "cpu":
            what = f"{name} lies on {t.device}, and the check runs on the CPU"
            why = "it runs on machines without a GPU"
            raise cannot("TARGET", what, why, "device='cpu'", at=at)
    try:
        built.tensors()
    except CannotCheckError as error:
        raise CannotCheckError(at_line(str(error), at)) from None
    return built


def _check_arguments(target: Target, at: str) -> None:
    try:
        signature = inspect.signature(target)
    except Exception:  # of a builtin, or of an object whose attributes raise errors
        return
    try:
        signature.bind("mesh", 0)
    except TypeError:
        written = f"({', '.join(signature.parameters)})"
        what = f"it takes {written}, and a target takes (mesh, tokens)"
        why = "a target is called for each layout and number of tokens"
        fixes = "def target(mesh, tokens): ...", "my_target = make_target(...)   # if it makes one"
        raise cannot("TARGET", what, why, *fixes, at=at) from None


# --- lines of the user's program ------------------------------------------------------------------


def line_of(target: object) -> str:
    """Where a target is defined, as file:line."""
    found = target
    for _ in range(100):  # an object may wrap itself
        if isinstance(found, functools.partial):
            inner: object = found.func
        else:
            inner = vars_of(found).get("__wrapped__")
        if inner is None:
            break
        found = inner
    if not isinstance(found, FunctionType):
        is_class = isinstance(found, type)
        found = getattr(found if is_class else type(found), "__init__" if is_class else "__call__")
    code = getattr(found, "__code__", None)
    if code is not None:
        return f"{short_path(code.co_filename)}:{code.co_firstlineno}"
    return str(vars_of(found).get("__module__") or type(target).__module__)


def vars_of(value: object) -> Mapping[str, Any]:
    """Attributes of an object itself; reading them runs no code of its class."""
    try:
        return cast(Mapping[str, Any], object.__getattribute__(value, "__dict__"))
    except AttributeError:
        return {}


def line_of_error(error: BaseException) -> str:
    """The innermost line of the user's program that an error came through, or nothing."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if is_users(frame.f_code.co_filename):
            return f"{short_path(frame.f_code.co_filename)}:{line}"
    return ""


# --- errors that nothing expected -----------------------------------------------------------------


def accounted(error: BaseException, at: str) -> SpmdMoeError:
    """Any error that ends a check, as one that says whose it is."""
    if isinstance(error, SpmdMoeError):
        nowhere = str(error).endswith(f"at:  {COMMAND_LINE}")  # raised outside of the user's code
        if nowhere and not isinstance(error, CannotCheckError):
            return CannotCheckError(at_line(str(error), at))
        return error
    if not isinstance(error, Exception):  # SystemExit and its like
        shown = f"{type(error).__name__}({', '.join(map(_repr, error.args))})"
        why = "a check that the target leaves is not a check that passes"
        fix = "raise ValueError   # where a layout is refused"
        at = line_of_error(error) or at
        return cannot("TARGET", f"it raises {shown}", why, fix, at=at)
    return checker_error(error, at)


def _repr(value: object) -> str:
    try:
        return " ".join(repr(value).split())
    except Exception:
        return type(value).__name__


def checker_error(error: BaseException, at: str) -> CheckerError:
    """A defect of the checker, with the innermost of its lines that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f"{short_path(f.filename)}:{f.lineno}" for f in frames if f.filename.startswith(PACKAGE)
    ]
    own = ours[-1] if ours else "an unknown line"
    return CheckerError(
        explain(
            "spmd-moe",
            f"the checker itself fails at {own}: {type(error).__name__}: {one_line(error)}",
            why="this is a defect of the checker; it says nothing about the module",
            fixes=["report it, with the module that is checked"],
            at=at,
        )
    )
