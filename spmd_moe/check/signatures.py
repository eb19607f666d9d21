"""Signatures as the types to check: what goes in and what comes out has the kinds that are written.

Checked code has no statement for a checker. For the time of a trace its annotated functions are
wrapped: on the way in, tensors are seen on the presentation (dense or expert) that the signature
names; on the way out, each must have the kinds that the signature gives it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from unittest import mock

import spmd_types
from spmd_types import (
    MeshAxis,
    Shard,
    _backward_hooks,
    _checker,
    _vmap,
    get_local_type,
    reinterpret_mesh,
    set_current_mesh,
)
from spmd_types.checker import typecheck
from torch import Tensor, nn

from spmd_moe.check.shards import cut_dims, mark
from spmd_moe.errors import PlacementError, describe, explain
from spmd_moe.mesh import MoEMesh
from spmd_moe.placement import DENSE, EXPERT, Kind, Placement, Role, V, placement_of


class _Here(threading.local):
    """The mesh of the rank that this thread is, while it is checked, and what ran there."""

    mesh: MoEMesh | None = None
    ran: tuple[str, ...] = ()


_HERE = _Here()

# spmd_types patches torch when a thread starts to check and takes the patch back when it ends. It
# says itself that several threads are not provided for; while `signatures` is open the patch stays.
_PATCHES = [
    (_checker, "_install_autograd_apply_patch", "_remove_autograd_apply_patch"),
    (_vmap, "install", "uninstall"),
    (_backward_hooks, "install", "uninstall"),
]


@contextmanager
def signatures(packages: Iterable[str]) -> Iterator[None]:
    """Let `checked` read the signatures in these packages; entered once, around all threads."""
    modules = _loaded(set(packages))
    with ExitStack() as stack:
        for owner, name in _annotated(modules):
            stack.callback(_wrap(owner, name, modules))
        for module, patch, unpatch in _PATCHES:
            getattr(module, patch)()
            stack.callback(getattr(module, unpatch))
            for name in (patch, unpatch):
                stack.enter_context(mock.patch.object(module, name, lambda: None))
        yield


@contextmanager
def checked(mesh: MoEMesh) -> Iterator[None]:
    """Strict local checking of this rank; `what_ran` tells which annotated functions it saw."""
    _HERE.mesh, _HERE.ran = mesh, ()
    try:
        with set_current_mesh(axes(mesh, DENSE)), typecheck(strict_mode="strict", local=True):
            yield
    finally:
        _HERE.mesh = None


def what_ran() -> tuple[str, ...]:
    return _HERE.ran


def packages_of(module: nn.Module) -> set[str]:
    """The top-level packages, or programs, that a module's classes come from; not torch's own."""
    found = {type(part).__module__ for part in module.modules()}
    return {name.partition(".")[0] for name in found} - {"torch", "spmd_types"}


def declare(x: Tensor, placement: Placement, mesh: MoEMesh) -> Tensor:
    """Give a tensor that comes from outside its type."""
    kinds = {
        axis(mesh, k.role): V if isinstance(k.kind, Shard) else k.kind
        for k in placement
        if mesh[k.role].size > 1
    }
    with set_current_mesh(axes(mesh, presentation(placement))):
        spmd_types.assert_type(x, kinds)
    _mark(x, placement, mesh)
    return x


def _mark(x: Tensor, placement: Placement, mesh: MoEMesh) -> None:
    """The dims that are cut; where V is said, none is known."""
    dims = cut_dims(x)
    said = {axis(mesh, k.role): k.kind for k in placement if mesh[k.role].size > 1}
    kept = {a: d for a, d in dims.items() if a not in said}
    mark(x, kept | {a: k.dim % x.ndim for a, k in said.items() if isinstance(k, Shard)})


def presentation(placement: Placement) -> tuple[Role, ...]:
    return DENSE if placement.kinds[0].role in DENSE else EXPERT


def axes(mesh: MoEMesh, roles: tuple[Role, ...]) -> dict[str, MeshAxis]:
    return {role.name: axis(mesh, role) for role in roles}


def axis(mesh: MoEMesh, role: Role) -> MeshAxis:
    return MeshAxis.of(mesh[role].group)


# --- wrapping ---------------------------------------------------------------------------------


def _loaded(packages: set[str]) -> list[types.ModuleType]:
    """The modules of these packages that are loaded, this checker's own left out."""
    here = __name__.rpartition(".")[0]
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in packages and not name.startswith(here) and module is not None
    ]


def _annotated(modules: Iterable[types.ModuleType]) -> Iterator[tuple[Any, str]]:
    """Every function and method that has a placement in its signature, with its owner."""
    for module in modules:
        owners = [module, *(c for c in vars(module).values() if _is_class_of(c, module))]
        for owner in owners:
            for name, function in list(vars(owner).items()):
                ours = isinstance(function, types.FunctionType)
                if ours and function.__module__ == module.__name__ and _placements(function):
                    yield owner, name


def _is_class_of(value: object, module: types.ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # names that exist for checkers only
        return {}


def _placements(function: Callable[..., Any]) -> list[Placement]:
    found = (placement_of(h) for name, h in _hints(function).items() if name != "return")
    last = placement_of(_hints(function).get("return"))
    return [p for p in (*found, last) if p is not None]


def _wrap(owner: Any, name: str, modules: Iterable[types.ModuleType]) -> Callable[[], None]:
    function = vars(owner)[name]
    hints, signature = _hints(function), inspect.signature(function)
    label = f"{function.__module__.removeprefix('spmd_moe.')}.{function.__qualname__}"
    roles = presentation(_placements(function)[0])

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = _HERE.mesh
        if mesh is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        _HERE.ran += (label,)
        with set_current_mesh(axes(mesh, roles)):
            for n, value in bound.arguments.items():
                if n in hints:
                    where = f"{label}, argument {n}"
                    bound.arguments[n] = _as_declared(value, hints[n], mesh, where, crossing=True)
            result = function(*bound.args, **bound.kwargs)
            try:
                return _as_declared(result, hints.get("return"), mesh, f"{label}, result")
            except PlacementError as error:
                vars(error)["function"] = function.__code__  # the report points there
                raise

    # Where `from x import f` has bound the function already, it must be wrapped too.
    places = [(owner, name)]
    if isinstance(owner, types.ModuleType):
        places += [(m, n) for m in modules for n, v in list(vars(m).items()) if v is function]
    for place, n in places:
        setattr(place, n, run)

    def restore() -> None:
        for place, n in places:
            setattr(place, n, function)

    return restore


# --- comparing --------------------------------------------------------------------------------


def _as_declared(value: Any, hint: Any, mesh: MoEMesh, where: str, crossing: bool = False) -> Any:
    """`value`, after every tensor in it that has a declared placement was found to have it."""
    if isinstance(value, Tensor):
        placement = placement_of(hint)
        return value if placement is None else _seen(value, placement, mesh, where, crossing)
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple and ... not in hint.__args__:
        parts = zip(value, typing.get_args(hint), strict=True)
        return tuple(_as_declared(v, h, mesh, where) for v, h in parts)
    if is_dataclass(value) and not isinstance(value, type):
        declared = _field_hints(type(value))
        for field in fields(value):
            inside = f"{where}.{field.name}"
            _as_declared(getattr(value, field.name), declared[field.name], mesh, inside)
    return value


@functools.cache
def _field_hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record, include_extras=True)


def _seen(x: Tensor, placement: Placement, mesh: MoEMesh, where: str, crossing: bool) -> Tensor:
    wanted = {a for a in axes(mesh, presentation(placement)).values() if a.size() > 1}
    kinds = get_local_type(x)
    if set(kinds) != wanted and (crossing or all(k is V for k in kinds.values())):
        x = reinterpret_mesh(x, frozenset(wanted))
        kinds = get_local_type(x)
    for k in placement:
        have = kinds.get(axis(mesh, k.role))
        want = V if isinstance(k.kind, Shard) else k.kind
        if mesh[k.role].size > 1 and have is not want:
            raise _wrong(x, k.role, have, k.kind, mesh, where)
    _mark(x, placement, mesh)
    return x


def _wrong(
    x: Tensor, role: Role, have: Kind | None, want: Kind, mesh: MoEMesh, where: str
) -> PlacementError:
    return PlacementError(
        explain(
            where,
            f"{describe(x)} is {have!r} on {mesh[role]}, but {want!r} is declared",
            why="a signature is the type that callers and gradients rely on",
            fixes=[
                f"redistribute(..., mesh[{role!r}], src={have!r}, dst={want!r})",
                f"{role!r}[{have!r}]   # in the signature, if that is what is meant",
            ],
        )
    )
