"""Weights: those of the lone module, and each rank's part of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from spmd_types import MeshAxis, R, V, get_local_type
from spmd_types.runtime import has_local_type
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spmd_moe.check.parity.built_target import Setup, tensors_of
from spmd_moe.check.parity.held_elements import (
    Part,
    Shape,
    by_shape,
    composed,
    local_of,
    of_dtensor,
    of_words,
)
from spmd_moe.check.parity.placement_words import Lies, lies, lies_of
from spmd_moe.check.target import cannot
from spmd_moe.core.declare_placements import declared
from spmd_moe.core.errors import describe
from spmd_moe.core.placement import Placement


class Telling(Protocol):
    """How ranks, as threads or processes, exchange descriptions of their shards."""

    def tell(self, key: object, value: Any, /) -> list[Any]: ...
    def held(self) -> AbstractContextManager[None]: ...


@final
class Table:
    """What ranks tell each other: not through a process group, whose use is the module's."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._told: dict[object, dict[int, Any]] = {}
        self._lock = threading.Lock()
        self._all = threading.Barrier(world)

    def tell(self, key: object, value: Any) -> list[Any]:
        """What every rank told under this key, in the order of the ranks; all must call it."""
        with self._lock:
            told = self._told.setdefault(key, {})
            told[dist.get_rank()] = value
        try:
            self._all.wait()
        except threading.BrokenBarrierError:
            sys.exit("another rank failed")  # as in a collective of torch's threads
        return [told[rank] for rank in range(self.world)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """A rank that leaves the block with an error lets the others go as well."""
        try:
            yield
        except BaseException:
            self._all.abort()
            raise


def enliven(module: nn.Module) -> dict[str, Tensor]:
    """Give weights that are all alike or not finite random values; the weights by name."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            local = local_of(parameter)
            if not local.numel() or not local.is_floating_point():
                continue
            if not bool(local.isfinite().all()):
                local.zero_()
            if bool((local == local.reshape(-1)[0]).all()):
                local.add_(torch.randn(local.shape, generator=random).to(local.dtype) * 0.3)
    return {name: local_of(t).detach().clone() for name, t in tensors_of(module).items()}


def read_parts(
    setup: Setup, whole: Mapping[str, Tensor], table: Telling, known: Mapping[str, set[str]]
) -> dict[str, Part]:
    """Of each parameter and buffer, under its name on one process: what this rank holds."""
    rank, module = dist.get_rank(), setup.module
    own = {setup.name(name): (name, t) for name, t in tensors_of(module).items()}
    shapes = table.tell("shapes", {name: tuple(t.shape) for name, (_, t) in own.items()})
    _check_names(own, whole, shapes)
    placed = _declared(module)
    found = {}
    for name, (here, t) in own.items():
        like = whole[name]
        every = [told.get(name) for told in shapes]
        alike: Sequence[Shape] | None = None if None in every else every
        words = next((w for key, w in setup.case.weights.items() if fnmatchcase(name, key)), None)
        what = f"TARGET, {name}"
        if isinstance(t, DTensor) and t.shape == like.shape:
            part = of_dtensor(t)
        elif words is not None:
            how = lies(words, setup.axes, what)
            part = of_words(tuple(like.shape), how, rank, setup.axes, alike, what)
        elif here in placed and any(k.role.name in setup.axes for k in placed[here]):
            how = lies_of(placed[here], setup.axes.groups)
            part = of_words(tuple(like.shape), how, rank, setup.axes, alike, what)
        else:
            part = _by_type_or_shape(setup, name, t, like, alike, rank, known)
        if isinstance(t, DTensor) and t.shape != like.shape:
            part = composed(part, of_dtensor(t))
        due = tuple(part.of(like).shape)
        if due != tuple(local_of(t).shape):
            said = f"as {part.lies} its part here is {list(due)}"
            have = f"the module has {list(local_of(t).shape)}"
            raise cannot(what, f"{said}, and {have}", "weights are cut from one process's")
        found[name] = part
    return found


def _check_names(
    own: Mapping[str, object], whole: Mapping[str, Tensor], shapes: Sequence[Mapping[str, Shape]]
) -> None:
    extra = [name for name in own if name not in whole]
    nowhere = [name for name in whole if not any(name in told for told in shapes)]
    if extra or nowhere:
        name = (extra or nowhere)[0]
        where = "on a rank and not on one process" if extra else "on one process and on no rank"
        why = "weights of ranks are cut from those of one process, by their names"
        fix = "names=lambda name: ...   # the name on one process of a rank's parameter"
        raise cannot(f"TARGET, {name}", f"there is such a parameter {where}", why, fix)


def _declared(module: nn.Module) -> dict[str, Placement]:
    """Declared placements, by full name."""
    return {
        f"{prefix}.{name}".removeprefix("."): placement
        for prefix, part in module.named_modules()
        for name, placement in declared(part).items()
    }


def _by_type_or_shape(
    setup: Setup,
    name: str,
    t: Tensor,
    like: Tensor,
    shapes: Sequence[Shape] | None,
    rank: int,
    known: Mapping[str, set[str]],
) -> Part:
    """By spmd_types' type, which names axes but no dims, and by the shapes of all ranks."""
    what = f"TARGET, {name}"
    if shapes is None:
        if t.shape != like.shape:
            why = "it is not on all ranks, and its shape is not that of one process"
            raise cannot(
                what, f"{describe(t)} of {describe(like)}", why, f"weights={{{name!r}: ..}}"
            )
        return Part(read="whole")
    own: tuple[str, ...] = ()
    among = known.get(name)
    if isinstance(setup.mesh, DeviceMesh) and has_local_type(t):
        types = get_local_type(t)
        named = _typed_axes(setup.mesh)
        own = tuple(named[a] for a, kind in types.items() if kind is R and a in named)
        among = {named[a] for a, kind in types.items() if kind is V and a in named} or among
    how = by_shape(name, like.dtype, tuple(like.shape), shapes, setup.axes, among)
    part = of_words(tuple(like.shape), Lies(how.cuts, own=own), rank, setup.axes, shapes, what)
    return Part(part.index, own=own, lies=part.lies, read="shape" if how.cuts else "whole")


def _typed_axes(mesh: DeviceMesh) -> dict[MeshAxis, str]:
    return {MeshAxis.of(mesh.get_group(name)): name for name in mesh.mesh_dim_names or ()}


@torch.no_grad()
def fill(setup: Setup, whole: Mapping[str, Tensor], parts: Mapping[str, Part]) -> None:
    """Give this rank its part of every weight."""
    for here, t in tensors_of(setup.module).items():
        name = setup.name(here)
        local_of(t).copy_(parts[name].of(whole[name]))
