"""Signatures as the types to check: what goes in and what comes out has the kinds that are written.

Checked code has no statement for a checker. For the time of a trace its annotated functions are
wrapped: on the way in, tensors are seen on the presentation (dense or expert) that the signature
names; on the way out, each must have the kinds that the signature gives it.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, final
from unittest import mock
from weakref import WeakKeyDictionary

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
from torch.utils._pytree import tree_leaves

from spmd_moe.check.cut_dims import cut_dims, mark
from spmd_moe.check.target import cannot
from spmd_moe.core.errors import PlacementError, describe, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import (
    DENSE,
    EXPERT,
    Kind,
    Placement,
    Role,
    V,
    annotations_of,
    placement_of,
)


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
        stack.callback(_READ.clear)
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
    dims, known = cut_dims(x), _axes(mesh).by_role
    said = {known[k.role]: k.kind for k in placement if mesh[k.role].size > 1}
    kept = {a: d for a, d in dims.items() if a not in said}
    mark(x, kept | {a: k.dim % x.ndim for a, k in said.items() if isinstance(k, Shard)})


def presentation(placement: Placement) -> tuple[Role, ...]:
    return DENSE if placement.kinds[0].role in DENSE else EXPERT


@final
@dataclass(frozen=True, slots=True)
class _Axes:
    """What spmd_types calls the axes of a mesh; asked for at every signature."""

    by_role: dict[Role, MeshAxis]
    named: dict[tuple[Role, ...], dict[str, MeshAxis]]  # of each presentation
    real: dict[tuple[Role, ...], frozenset[MeshAxis]]  # those of more than one rank


_AXES: WeakKeyDictionary[MoEMesh, _Axes] = WeakKeyDictionary()


def _axes(mesh: MoEMesh) -> _Axes:
    found = _AXES.get(mesh)
    if found is None:
        by_role = {role: MeshAxis.of(mesh[role].group) for role in (*DENSE, *EXPERT)}
        both: tuple[tuple[Role, ...], ...] = (DENSE, EXPERT)
        named = {roles: {r.name: by_role[r] for r in roles} for roles in both}
        real = {k: frozenset(a for a in of.values() if a.size() > 1) for k, of in named.items()}
        found = _AXES[mesh] = _Axes(by_role, named, real)
    return found


def axes(mesh: MoEMesh, roles: tuple[Role, ...]) -> dict[str, MeshAxis]:
    return _axes(mesh).named[roles]


def axis(mesh: MoEMesh, role: Role) -> MeshAxis:
    return _axes(mesh).by_role[role]


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
                if ours and function.__module__ == module.__name__ and _is_annotated(function):
                    yield owner, name


def _is_class_of(value: object, module: types.ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _is_annotated(function: Callable[..., Any]) -> bool:
    """With a placement, or with something that cannot be read, and may be one."""
    hints, unknown = annotations_of(function)
    return bool(unknown) or any(placement_of(hint) is not None for hint in hints.values())


def _roles(hints: Mapping[str, Any]) -> tuple[Role, ...] | None:
    """The presentation that a signature speaks of, where it has a placement."""
    found = (placement_of(hint) for hint in hints.values())
    first = next((placement for placement in found if placement is not None), None)
    return None if first is None else presentation(first)


def _wrap(owner: Any, name: str, modules: Iterable[types.ModuleType]) -> Callable[[], None]:
    function = vars(owner)[name]
    (hints, unknown), signature = annotations_of(function), inspect.signature(function)
    label = f"{function.__module__.removeprefix('spmd_moe.')}.{function.__qualname__}"
    roles = _roles(hints)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = _HERE.mesh
        if mesh is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        for n, written in unknown.items():
            readable(bound.arguments.get(n), n, written, function)
        if roles is None:
            return readable(function(*args, **kwargs), "return", unknown.get("return"), function)
        _HERE.ran += (label,)
        with set_current_mesh(axes(mesh, roles)):
            for n, value in bound.arguments.items():
                if n in hints:
                    where = f"{label}, argument {n}"
                    bound.arguments[n] = _as_declared(value, hints[n], mesh, where, crossing=True)
            result = function(*bound.args, **bound.kwargs)
            readable(result, "return", unknown.get("return"), function)
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


_NO_PLACEMENT = {"torch", "Tensor", "Optional", "None", "list", "tuple", "dict", "str", "int"}


def readable(value: Any, name: str, written: str | None, owner: Any) -> Any:
    """`value`, if no tensor is in it whose annotation cannot be read, and may be a placement."""
    if written is None or set(re.findall(r"\w+", written)) <= _NO_PLACEMENT:
        return value
    if any(isinstance(x, Tensor) for x in tree_leaves(value)):
        what = f"{name!r} is annotated {written!r}, in which a name does not exist when it runs"
        why = "a placement that cannot be read would be taken for none"
        fix = "import it without a condition   # not under `if TYPE_CHECKING:`"
        raise cannot(f"{owner.__module__}.{owner.__qualname__}", what, why, fix)
    return value


# --- comparing --------------------------------------------------------------------------------


# Asked at every call, of few annotations, which live as long as what they stand in; kept, so that
# an id stays theirs.
_READ: dict[int, tuple[Any, Placement | None]] = {}


def _placement_of(hint: Any) -> Placement | None:
    read = _READ.get(id(hint))
    if read is None:
        read = _READ[id(hint)] = hint, placement_of(hint)
    return read[1]


def _as_declared(value: Any, hint: Any, mesh: MoEMesh, where: str, crossing: bool = False) -> Any:
    """`value`, after every tensor in it that has a declared placement was found to have it."""
    if isinstance(value, Tensor):
        placement = _placement_of(hint)
        return value if placement is None else _seen(value, placement, mesh, where, crossing)
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple and ... not in hint.__args__:
        parts = zip(value, typing.get_args(hint), strict=True)
        return tuple(_as_declared(v, h, mesh, where) for v, h in parts)
    if is_dataclass(value) and not isinstance(value, type):
        declared = _field_hints(type(value))
        for field in fields(value):
            inside = f"{where}.{field.name}"
            _as_declared(getattr(value, field.name), declared.get(field.name), mesh, inside)
    return value


@functools.cache
def _field_hints(record: type) -> dict[str, Any]:
    return annotations_of(record)[0]


def _seen(x: Tensor, placement: Placement, mesh: MoEMesh, where: str, crossing: bool) -> Tensor:
    known = _axes(mesh)
    wanted = known.real[presentation(placement)]
    kinds = get_local_type(x)
    if kinds.keys() != wanted and (crossing or all(k is V for k in kinds.values())):
        x = reinterpret_mesh(x, wanted)
        kinds = get_local_type(x)
    for k in placement:
        have = kinds.get(known.by_role[k.role])
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
