"""Declared placements checked at every call of an annotated function.

During a trace the annotated functions are intercepted. Tensors are reinterpreted for the
presentation (dense or expert) that the signature names; each argument and each result must have its
declared kinds. Checked code needs no statement for a checker.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import BoundArguments
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
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from spmd_moe.check.follow_sharded_dims import cut_dims, mark
from spmd_moe.check.target import cannot
from spmd_moe.core.errors import PlacementError, describe, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE, EXPERT, Kind, Placement, Role, V, placement_of
from spmd_moe.core.torch_modes import is_unchecked
from spmd_moe.signatures.annotated_functions import AnnotatedFunction, annotated_functions
from spmd_moe.signatures.declared_tensors import DeclaredTensor
from spmd_moe.signatures.interception import intercepted


class _Here(threading.local):
    """The mesh of the rank that this thread checks, and the annotated functions that it ran."""

    mesh: MoEMesh | None = None
    ran: frozenset[str] = frozenset()


_HERE = _Here()

# spmd_types patches torch while a thread checks, and does not support several threads. While
# `signatures` is entered, the patches stay.
_PATCHES = [
    (_checker, "_install_autograd_apply_patch", "_remove_autograd_apply_patch"),
    (_vmap, "install", "uninstall"),
    (_backward_hooks, "install", "uninstall"),
]


@contextmanager
def signatures(packages: Iterable[str]) -> Iterator[None]:
    """Check the annotated functions of these packages inside `checked`. Enter it once, before any
    threads start."""
    functions = list(annotated_functions(packages))
    presentations = {each: _presentation_of(each) for each in functions}

    def run(each: AnnotatedFunction, bound: BoundArguments) -> Any:
        mesh = _HERE.mesh
        # Inside an autograd function the checker's mode is off and tensors have no types.
        if mesh is None or is_unchecked():
            return each.original(*bound.args, **bound.kwargs)
        return _checked_call(each, bound, mesh, presentations[each])

    with ExitStack() as stack:
        stack.enter_context(intercepted(functions, run))
        for module, patch, unpatch in _PATCHES:
            getattr(module, patch)()
            stack.callback(getattr(module, unpatch))
            for name in (patch, unpatch):
                stack.enter_context(mock.patch.object(module, name, lambda: None))
        yield


@contextmanager
def checked(mesh: MoEMesh) -> Iterator[None]:
    """Strict local checking of this rank."""
    _HERE.mesh, _HERE.ran = mesh, frozenset()
    try:
        with set_current_mesh(axes(mesh, DENSE)), typecheck(strict_mode="strict", local=True):
            yield
    finally:
        _HERE.mesh = None


def what_ran() -> frozenset[str]:
    """Qualified names of the annotated functions that ran since `checked` was entered."""
    return _HERE.ran


def declare(x: Tensor, placement: Placement, mesh: MoEMesh) -> Tensor:
    """Give a tensor that checked code receives from outside its type."""
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
    """Record the sharded dims; for V, none is known."""
    dims, known = cut_dims(x), _axes(mesh).by_role
    said = {known[k.role]: k.kind for k in placement if mesh[k.role].size > 1}
    kept = {a: d for a, d in dims.items() if a not in said}
    mark(x, kept | {a: k.dim % x.ndim for a, k in said.items() if isinstance(k, Shard)})


def presentation(placement: Placement) -> tuple[Role, ...]:
    return DENSE if placement.kinds[0].role in DENSE else EXPERT


@final
@dataclass(frozen=True, slots=True)
class _Axes:
    """spmd_types' names of the axes of a mesh; cached, since every call needs them."""

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


# --- calls ------------------------------------------------------------------------------------


def _presentation_of(function: AnnotatedFunction) -> tuple[Role, ...] | None:
    """That of the first placement in a signature, records not counted."""
    found = filter(None, map(placement_of, function.hints.values()))
    return next(map(presentation, found), None)


def _checked_call(
    each: AnnotatedFunction, bound: BoundArguments, mesh: MoEMesh, roles: tuple[Role, ...] | None
) -> Any:
    for name, written in each.unreadable.items():
        readable(bound.arguments.get(name), name, written, each.function)
    _HERE.ran |= {each.name}
    with nullcontext() if roles is None else set_current_mesh(axes(mesh, roles)):
        for name, value in bound.arguments.items():
            found = each.argument(name, value)
            bound.arguments[name] = _as_declared(value, found, mesh, each.name, crossing=True)
        result = each.original(*bound.args, **bound.kwargs)
        readable(result, "return", each.unreadable.get("return"), each.function)
        try:
            return _as_declared(result, each.result(result), mesh, each.name)
        except PlacementError as error:
            vars(error)["function"] = each.original.__code__  # the report points there
            raise


_NO_PLACEMENT = {"torch", "Tensor", "Optional", "None", "list", "tuple", "dict", "str", "int"}


def readable(value: Any, name: str, written: str | None, owner: Any) -> None:
    """Raise if a value holds a tensor and its annotation, which may place it, is unreadable."""
    if written is None or set(re.findall(r"\w+", written)) <= _NO_PLACEMENT:
        return
    if any(isinstance(x, Tensor) for x in tree_leaves(value)):
        what = f"{name!r} is annotated {written!r}, in which a name does not exist when it runs"
        why = "a placement that cannot be read would be taken for none"
        fix = "import it without a condition   # not under `if TYPE_CHECKING:`"
        raise cannot(f"{owner.__module__}.{owner.__qualname__}", what, why, fix)


def _as_declared(
    value: Any, found: Iterable[DeclaredTensor], mesh: MoEMesh, where: str, crossing: bool = False
) -> Any:
    """`value`, with its declared tensors as tensors of the presentation that is declared."""
    changed: dict[int, Tensor] = {}
    for path, x, placement in found:
        seen = _seen(x, placement, mesh, f"{where}, {path}", crossing)
        if seen is not x:
            changed[id(x)] = seen
    return tree_map_only(Tensor, lambda x: changed.get(id(x), x), value) if changed else value


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
