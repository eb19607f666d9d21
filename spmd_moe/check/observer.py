"""Observer of a traced run: each operation with its line, types and plain arguments.

The observer stands before spmd_types' checker and looks at what comes out of it. A program point is
the chain of lines of checked code that leads to an operation, with the operation's name; in a loop
it is passed several times.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final
from unittest import mock

import torch
from spmd_types import MeshAxis, P, Shard, V, get_local_type, is_type_checking
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from spmd_moe.check.findings import allowed, finding, short_path
from spmd_moe.check.follow_sharded_dims import (
    asks_for_whole,
    cut_dims,
    follow,
    is_given,
    keep_rows,
    moved,
    rows_are_given,
)
from spmd_moe.check.mirror_world import Issued
from spmd_moe.check.random_draws import is_random, seed_of
from spmd_moe.check.record import Operand, Point, Record, Seen, Types
from spmd_moe.check.source_lines import Lines
from spmd_moe.check.tensor_origin import descend, lineage
from spmd_moe.core.errors import describe


@final
class Observer(TorchFunctionMode):
    """Sees every operation before the type checker does, and the types of its results after."""

    def __init__(
        self,
        packages: set[str],
        names: Mapping[Any, str],
        log: list[Issued],
        typed: bool,
        whole: Record | None = None,  # of the same run in one process
    ) -> None:
        super().__init__()
        self._whole, self._seed = whole, torch.initial_seed()
        self.record, self.log, self.typed = Record(), log, typed
        self._lines, self._names = Lines(packages, __file__), names
        self._shown: dict[object, Types] = {}
        self._made, self._kept = (
            set[int](),
            list[Tensor](),
        )  # by factories; kept, so ids stay theirs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        owner = getattr(func, "__self__", None)
        if func.__name__ == "apply" and isinstance(owner, type):
            # An autograd.Function, whose `apply` the checker has patched: ask for it again.
            run, name = owner.apply, owner.__name__  # type: ignore[attr-defined]  # see above
        else:
            run, name = func, _name_of(func)
        lines = self._lines.here(sys._getframe(1))
        if not lines:
            return run_operation(run, args, kwargs)
        leaves = list(_leaves((args, kwargs)))
        tensors, plain = _tensors(leaves), tuple(repr(x) for x in leaves if isinstance(x, _PLAIN))
        drawn = is_random(name, args, kwargs)
        seed = seed_of(leaves, self._seed) if drawn else None
        plain += () if seed is None else (f"seed {seed}",)
        given = self._operands(tensors, bool(plain))
        if name.endswith("_") and given:  # what was in it is overwritten, and may be anything
            given = (replace(given[0], total=0.0), *given[1:])
        self._before(func, name, args, kwargs, lines)
        found, shapes = tuple[Types, ...](), tuple[tuple[int, ...], ...]()
        reads, before = len(self.record.reads), len(self.log)
        try:
            result = run_operation(run, args, kwargs)
            results = _tensors(_leaves(result))
            if not given:  # a factory: what it makes is of a size that the rank gave it
                self._made.update(map(id, results))
                self._kept += results
            found = tuple(map(self._types, results))
            shapes = tuple(tuple(x.shape) for x in results)
        finally:  # what is refused has been asked for
            even = self._even(name, args, kwargs)
            seen = Seen(given, plain, found, shapes, reads, even)
            point = Point(lines, name)
            passes = self.record.points.setdefault(point, [])
            passes.append(seen)
            for file, line in lines:
                self.record.lines.setdefault(file, set()).add(line)
        if name in _READS:
            own = bool(given) and not given[0].made_of.moved
            self.record.reads.append((before, repr(result), given[0].types if own else ()))
        # What is written into gets the lineage of what is written.
        written = tensors[:1] if name == "__setitem__" else results
        descend([x.made_of for x in given], written, (point, len(passes)), len(self.log) > before)
        if self.typed:
            self._count(name, results, found, lines)
            if drawn and seed is None:
                self._drawn(name, results, found, lines)
            self._follow(point, args, kwargs, tensors, results)
            self._cut_off(args, results)
        return result

    @contextmanager
    def of_subclasses(self) -> Iterator[None]:
        """Sees two methods of torch's own subclasses of Tensor, which torch tells no mode.

        A tensor that leaves its DTensor is what it was there; behind that line it is a plain
        tensor, added up or not as if it were always the same. The result of a collective waits
        before it is read, and what it reads then is a tensor that the checker has never seen.
        """
        to_local = DTensor.to_local

        def leave(x: DTensor, *args: Any, **kwargs: Any) -> Tensor:
            lines = self._lines.here(sys._getframe(1))
            if lines:
                seen = Seen((), (), (self._types(x),), (), len(self.record.reads))
                self.record.points.setdefault(Point(lines, "to_local"), []).append(seen)
            return to_local(x, *args, **kwargs)

        def read(x: Tensor) -> Any:
            return Tensor.tolist(x.clone())

        with (
            mock.patch.object(DTensor, "to_local", leave),
            mock.patch.object(AsyncCollectiveTensor, "tolist", read),
        ):
            yield

    def _operands(self, tensors: list[Tensor], plain: bool) -> tuple[Operand, ...]:
        """Their elements are added up only where `compare` may ask for it, since that takes time:
        where there are plain arguments, and nothing is V on all axes."""
        types = [self._types(x) for x in tensors]
        varying = [all(kind == "V" for _, kind in own) for own in types]
        asked = plain and not any(varying)
        return tuple(
            Operand(own, tuple(x.shape), 0, 0.0, lineage(x))
            if v or isinstance(x, DTensor) or id(x) in self._made
            else Operand(
                own,
                tuple(x.shape),
                int(x.storage_offset()),
                _total(x) if asked else 0.0,
                lineage(x),
            )
            for x, own, v in zip(tensors, types, varying, strict=True)
        )

    def _types(self, x: Tensor) -> Types:
        if isinstance(x, DTensor):
            names = x.device_mesh.mesh_dim_names or tuple(map(str, range(x.device_mesh.ndim)))
            return tuple(zip(names, map(_short_placement, x.placements), strict=True))
        kinds = get_local_type(x)
        key = frozenset(kinds.items())
        if key not in self._shown:
            shown = ((self._names.get(axis, str(axis)), repr(k)) for axis, k in kinds.items())
            self._shown[key] = tuple(sorted(shown))
        return self._shown[key]

    def _before(
        self, func: Any, name: str, args: Any, kwargs: Any, lines: tuple[tuple[str, int], ...]
    ) -> None:
        if name in _CUTS and _has_gradient(args):
            self._say("X3", "detach", lines, f"{name} cuts the gradient of {describe(args[0])}",
                "what flows back stops here, and a parameter before it learns nothing of it",
                "leave the tensor whole, or move this line under a no_grad of its own")  # fmt: skip
        if not _moves(func, name):
            return
        x = args[0]
        if _is_cut_off(x) and not torch.is_grad_enabled():
            self._say("X3", "no_grad", lines, f"{name} of {describe(x)} under no_grad",
                "the gradient of what is moved has no way back over the ranks",
                "move it outside of no_grad, and only what has no gradient inside")  # fmt: skip
        if func.__module__.startswith("spmd_types") and name in _SUMS:
            self._check_sum(name, x, args, kwargs, lines)

    def _check_sum(
        self, name: str, x: Tensor, args: Any, kwargs: Any, lines: tuple[tuple[str, int], ...]
    ) -> None:
        axis = args[1] if len(args) > 1 else kwargs.get("axis")
        if axis is None or not self.typed:
            return
        axis = axis if isinstance(axis, MeshAxis) else MeshAxis.of(axis)
        kind = get_local_type(x).get(axis)
        if axis.size() > 1 and kind is not P and kwargs.get("src", P) in (P, V):
            label = self._names.get(axis, str(axis))
            what = f"{name} takes {describe(x)}, which is {kind!r} on {label}"
            self._say("X1", "sum", lines, what,
                "only parts of a sum may be added up; these are rows of different things",
                "declare_sum(x, axis)   # where x is made, if it is a part of a sum")  # fmt: skip

    def _even(self, name: str, args: Any, kwargs: Any) -> tuple[str, int] | None:
        """What a move of a shard without a shape says of the other ranks' rows.

        Only of rows whose number comes from the inputs: one that was read from data is not the
        true one here, where the other ranks are mirror images.
        """
        axis, dst = _move_of(name, args, kwargs)
        src = args[2].src if name == "Move" else kwargs.get("src")
        told = args[2].told if name == "Move" else kwargs.get("split_sizes") is not None
        if axis is None or told or not isinstance(src, Shard) or src == dst:
            return None
        if src.dim != 0 or not rows_are_given(args[0]):
            return None
        return self._names.get(axis, str(axis)), args[0].shape[src.dim]

    def _follow(
        self,
        point: Point,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        results: list[Tensor],
    ) -> None:
        """Which dims are cut: X7."""
        name, lines = point.op, point.lines
        axis, dst = _move_of(name, args, kwargs)
        if axis is None and name != "Exchange":
            keep_rows(name, args, tensors, results)
        if axis is not None and results:
            moved(args[0], results[0], axis, dst)
            return
        whole = None
        if tensors and results and asks_for_whole(name, tensors[0], results[0]):
            self.record.asks = True
            if self._whole is not None:
                number = len(self.record.points[point]) - 1
                whole = self._whole.shapes_at(point, number)
        if not any(map(cut_dims, tensors)):
            return
        received = bool(tensors) and lineage(tensors[0]).moved
        misuse = follow(name, args, kwargs, results, whole, received)
        if misuse is not None:
            label = self._names.get(misuse.axis, str(misuse.axis))
            why, *fixes = (text.replace("{axis}", label) for text in (misuse.why, *misuse.fixes))
            self._say("X7", "shard", lines, f"{name} of {describe(tensors[0])}: {why}",
                "on the whole it would compute something else than on the parts of the ranks",
                *fixes)  # fmt: skip

    def _drawn(
        self,
        name: str,
        results: list[Tensor],
        found: tuple[Types, ...],
        lines: tuple[tuple[str, int], ...],
    ) -> None:
        """Random numbers that no seed makes the same on the ranks of an axis: X2."""
        same = (
            (x, axis, kind)
            for x, types in zip(results, found, strict=True)
            for axis, kind in types
            if kind in ("R", "I")
        )
        for x, axis, kind in itertools.islice(same, 1):
            what = f"{name} draws {describe(x)}, which is {kind} on {axis}"
            self._say("X2", "random", lines, what,
                "each rank has a generator of its own, so the ranks draw different numbers",
                f"torch.manual_seed(seed)   # before it, with one seed for the ranks of {axis}",
                f"redistribute(x, {axis}, src={kind}, dst=S(0))   # before it: each draws its own",
                "# spmd: allow random - <reason>   # where the ranks are seeded alike")  # fmt: skip

    def _cut_off(self, args: Any, results: list[Tensor]) -> None:
        """Under no_grad, what is made of tensors that have a history in checked code has lost it.

        What the module was given does not count: a module may be run for its values alone.
        """
        if torch.is_grad_enabled() or not any(map(_is_cut_off, _tensors(_leaves(args)))):
            return
        for x in results:
            if x.is_floating_point():
                setattr(x, _LOST, True)

    def _count(
        self,
        name: str,
        results: list[Tensor],
        found: tuple[Types, ...],
        lines: tuple[tuple[str, int], ...],
    ) -> None:
        self.record.tensors += len(found)
        missing = sum(not types for types in found)
        if not missing or not is_type_checking():
            return
        self.record.untyped += missing
        first = next(x for x, types in zip(results, found, strict=True) if not types)
        self._say("untyped", "untyped", lines, f"{name} gives {describe(first)}, which has no type",
            "what has no type is followed by no check",
            "Placed[Tensor, ...] in the signature or class that it comes from")  # fmt: skip

    def _say(self, rule: str, what: str, lines: tuple[tuple[str, int], ...], *text: str) -> None:
        file, line = lines[-1]
        if not allowed(what, file, line):
            where = self._lines.function.get(lines[-1], "forward")
            at = f"{short_path(file)}:{line}"
            self.record.findings.append(finding(rule, at, where, *text))


def run_operation(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One operation of the module. An error that comes through this line is the module's."""
    return run(*args, **kwargs)


# --- operations ---------------------------------------------------------------------------------

_READS = {"tolist", "item", "__int__", "__index__", "__bool__", "__float__"}
_CUTS = {"detach", "detach_", "data"}
_SUMS = {"all_reduce", "reduce_scatter"}
_MOVES = {*_SUMS, "all_gather", "all_to_all", "redistribute", "convert", "Move", "Exchange"}


_LOST = "_spmd_moe_lost"


def _is_cut_off(x: Tensor) -> bool:
    """It has a history that will not be known to what is made of it now."""
    own = vars(x)
    made_here = x.requires_grad and not x.is_leaf and not is_given(x)
    return x.is_floating_point() and (made_here or _LOST in own)


def _move_of(name: str, args: Any, kwargs: Any) -> tuple[MeshAxis | None, object]:
    """The axis of a move and where it leads, if it is one."""
    if name == "Move":
        return MeshAxis.of(args[1]), args[2].dst
    if name in _MOVES and "dst" in kwargs:
        axis = args[1] if len(args) > 1 else kwargs.get("axis")
        return (axis if isinstance(axis, MeshAxis) else MeshAxis.of(axis)), kwargs["dst"]
    return None, None


def _moves(func: Any, name: str) -> bool:
    module = getattr(func, "__module__", None) or ""
    return name in _MOVES and (module.startswith("spmd_types") or name in ("Move", "Exchange"))


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", "?")
    if name in ("__get__", "__set__"):  # of a property of tensors
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name


def _has_gradient(args: Any) -> bool:
    x = args[0]
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


_PLAIN = (int, float, bool, str, slice, torch.dtype)


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def _total(x: Tensor) -> float:
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return float(x.sum())


def _leaves(values: Any) -> Iterator[Any]:
    """What is in arguments or results; torch's own walk knows more containers, and takes longer."""
    if isinstance(values, tuple | list):
        for value in values:
            yield from _leaves(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _leaves(value)
    else:
        yield values


def _short_placement(placement: Any) -> str:
    if placement.is_shard():
        return f"S({placement.dim})"
    return "R" if placement.is_replicate() else "P"
