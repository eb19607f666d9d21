"""Run the layer under spmd_types' strict checker, with the signatures as the types to check.

Layer code has no statement for a checker. Here its annotated functions are wrapped for the time of
a `with`: on the way in, tensors are seen on the presentation (dense or expert) that the signature
names; on the way out, each tensor must have the kinds that the signature gives it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from unittest import mock

import spmd_types
import torch.distributed as dist
from spmd_types import MeshAxis, Shard, get_local_type, reinterpret_mesh, set_current_mesh
from spmd_types.checker import typecheck
from torch import Tensor

from spmd_moe.mesh import MoEMesh
from spmd_moe.placement import DENSE, EXPERT, Placement, Role, V, placement_of

LAYER = [
    "boundary",
    "router",
    "permute",
    "dispatch.local",
    "dispatch.all_to_all",
    "dispatch.all_gather",
    "dispatch.fixed",
    "experts",
    "combine",
    "shared",
    "losses",
]


class _Here(threading.local):
    """The mesh of the rank that this thread is, while it is checked, and what ran there."""

    mesh: MoEMesh | None = None
    ran: tuple[str, ...] = ()


_HERE = _Here()


@contextmanager
def signatures() -> Iterator[None]:
    """Let `checked` read signatures; entered once, around all threads that are to be checked.

    spmd_types patches torch when a thread starts to check and takes the patch back when it ends.
    The patch is in force in here, and stays so when the first of several threads ends.
    """
    undo = [_wrap(owner, name) for owner, name in _annotated()]
    try:
        with typecheck(), ExitStack() as stack:
            for name in _PATCHES:
                stack.enter_context(mock.patch(f"spmd_types.{name}", lambda: None))
            yield
    finally:
        for restore in undo:
            restore()


_PATCHES = [
    "_checker._install_autograd_apply_patch",
    "_checker._remove_autograd_apply_patch",
    "_vmap.install",
    "_vmap.uninstall",
    "_backward_hooks.install",
    "_backward_hooks.uninstall",
]


@contextmanager
def checked(mesh: MoEMesh) -> Iterator[None]:
    """Strict local checking of this rank; `what_ran` tells which annotated functions it saw."""
    _HERE.mesh, _HERE.ran = mesh, ()
    try:
        with set_current_mesh(_axes(mesh, DENSE)), typecheck(strict_mode="strict", local=True):
            yield
    finally:
        _HERE.mesh = None


def name_axes(mesh: MoEMesh) -> None:
    """Make every axis known to spmd_types, whose list of names must not grow while it is read."""
    with _NAMING:
        for role in (*DENSE, *EXPERT):
            _axis(mesh, role)
    dist.barrier()


_NAMING = threading.Lock()


def what_ran() -> tuple[str, ...]:
    return _HERE.ran


def declare(x: Tensor, placement: Placement, mesh: MoEMesh) -> Tensor:
    """Give a tensor that comes from outside its type."""
    kinds = {
        _axis(mesh, k.role): V if isinstance(k.kind, Shard) else k.kind
        for k in placement
        if mesh[k.role].size > 1
    }
    with set_current_mesh(_axes(mesh, _presentation(placement))):
        spmd_types.assert_type(x, kinds)
    return x


def _annotated() -> Iterator[tuple[Any, str]]:
    """Every function and method of the layer that has a placement in its signature."""
    for file in LAYER:
        module = importlib.import_module(f"spmd_moe.{file}")
        owners = [module, *(c for c in vars(module).values() if _is_class_of(c, module))]
        for owner in owners:
            for name, function in list(vars(owner).items()):
                ours = isinstance(function, types.FunctionType)
                ours = ours and function.__module__ == module.__name__
                if ours and any(_first_placement(h) for h in _hints(function).values()):
                    yield owner, name


def _is_class_of(value: object, module: types.ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def _wrap(owner: Any, name: str) -> Callable[[], None]:
    function = vars(owner)[name]
    hints, signature = _hints(function), inspect.signature(function)
    label = f"{function.__module__.removeprefix('spmd_moe.')}.{function.__qualname__}"
    arguments = [h for n, h in hints.items() if n != "return"] + [hints.get("return")]
    roles = _presentation(next(filter(None, map(_first_placement, arguments))))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = _HERE.mesh
        if mesh is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        _HERE.ran += (label,)
        with set_current_mesh(_axes(mesh, roles)):
            for n, value in bound.arguments.items():
                if n in hints:
                    where = f"{label}, argument {n}"
                    bound.arguments[n] = _as_declared(value, hints[n], mesh, where, crossing=True)
            result = function(*bound.args, **bound.kwargs)
            return _as_declared(result, hints.get("return"), mesh, f"{label}, result")

    # Where `from x import f` has bound the function already, it must be wrapped too.
    places = [(owner, name)]
    if isinstance(owner, types.ModuleType):
        for file in (*LAYER, "moe"):
            module = importlib.import_module(f"spmd_moe.{file}")
            places += [(module, n) for n, v in vars(module).items() if v is function]
    for place, n in places:
        setattr(place, n, run)

    def restore() -> None:
        for place, n in places:
            setattr(place, n, function)

    return restore


def _as_declared(value: Any, hint: Any, mesh: MoEMesh, where: str, crossing: bool = False) -> Any:
    """`value`, after every tensor in it that has a declared placement was found to have it."""
    if isinstance(value, Tensor):
        placement = placement_of(hint)
        return value if placement is None else _seen(value, placement, mesh, where, crossing)
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple and ... not in hint.__args__:
        parts = zip(value, typing.get_args(hint), strict=True)
        return tuple(_as_declared(v, h, mesh, where) for v, h in parts)
    if is_dataclass(value) and not isinstance(value, type):
        declared = typing.get_type_hints(type(value), include_extras=True)
        for field in fields(value):
            _as_declared(
                getattr(value, field.name), declared[field.name], mesh, f"{where}.{field.name}"
            )
    return value


def _seen(x: Tensor, placement: Placement, mesh: MoEMesh, where: str, crossing: bool) -> Tensor:
    axes = _axes(mesh, _presentation(placement))
    wanted = {a for a in axes.values() if a.size() > 1}
    kinds = get_local_type(x)
    if set(kinds) != wanted and (crossing or all(k is V for k in kinds.values())):
        x = reinterpret_mesh(x, frozenset(wanted))
        kinds = get_local_type(x)
    for k in placement:
        have = kinds.get(_axis(mesh, k.role))
        want = V if isinstance(k.kind, Shard) else k.kind
        if mesh[k.role].size > 1:
            assert have is want, f"{where}: {have} on {k.role}, but {want} is declared"
    return x


def _first_placement(hint: Any) -> Placement | None:
    return placement_of(hint) if hint is not None else None


def _presentation(placement: Placement) -> tuple[Role, ...]:
    return DENSE if placement.kinds[0].role in DENSE else EXPERT


def _axes(mesh: MoEMesh, roles: tuple[Role, ...]) -> dict[str, MeshAxis]:
    return {role.name: _axis(mesh, role) for role in roles}


def _axis(mesh: MoEMesh, role: Role) -> MeshAxis:
    return MeshAxis.of(mesh[role].group)
