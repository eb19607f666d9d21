"""One traced run: the real module, forward and backward, as one rank of a world of mirrors."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import final

import torch
from spmd_types import MeshAxis, Shard, SpmdTypeError, get_local_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from spmd_moe.check.check_declarations import declared_types, misdeclared, unsaid
from spmd_moe.check.checker_escapes import escapes
from spmd_moe.check.findings import Finding, allowed, finding, short_path
from spmd_moe.check.follow_sharded_dims import give
from spmd_moe.check.layouts import Layout
from spmd_moe.check.mirror_world import Issued, mirror_world
from spmd_moe.check.observer import Observer, run_operation
from spmd_moe.check.record import Record
from spmd_moe.check.signatures import axis, checked, declare
from spmd_moe.check.source_lines import is_checked
from spmd_moe.check.target import (
    CannotCheckError,
    Case,
    CheckerError,
    Target,
    build,
    cannot,
    checker_error,
    line_of,
)
from spmd_moe.check.tensor_origin import lineage
from spmd_moe.core.errors import PlacementError, SpmdMoeError, describe, plural
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.messages import at_line, text_of
from spmd_moe.core.placement import DENSE, EXPERT, Placement, V


@final
@dataclass(frozen=True, slots=True)
class Configuration:
    """One thing to trace: a layout, how many tokens a cell of dp and cp has, which rank to be."""

    layout: Layout
    tokens: int
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.layout}, {plural(self.tokens, 'token')}, rank {self.rank}"


@final
@dataclass(slots=True)
class Trace:
    """What one run did, and what was found."""

    configuration: Configuration
    record: Record = field(default_factory=Record)
    findings: list[Finding] = field(default_factory=list)
    forward: list[Issued] = field(default_factory=list)
    backward: list[Issued] = field(default_factory=list)
    shapes: tuple[tuple[int, ...], ...] = ()  # of the outputs
    refused: str = ""  # why the target does not build this


@final
@dataclass(frozen=True, slots=True)
class Place:
    """One rank of a layout, in a world where it is alone; good for one trace after another."""

    mesh: MoEMesh
    log: list[Issued]


@contextmanager
def standing(layout: Layout, rank: int) -> Iterator[Place]:
    """Be this rank. In a world of thousands the mesh takes longer to make than a trace."""
    with mirror_world(layout.world, rank) as log:
        yield Place(layout.mesh(), log)


def trace(
    target: Target,
    configuration: Configuration,
    packages: set[str],
    here: Place,
    whole: Record | None = None,
) -> Trace:
    """Run the target once as one rank; to be called inside `signatures(packages)`.

    `whole` is the record of the same run in one process: it tells which dims a view merges where
    the shapes of a shard do not.
    """
    found, mesh, log = Trace(configuration), here.mesh, here.log
    # The same numbers on every rank: what is R or I is then the same on all of them.
    with _seeded():
        try:
            built = build(target, mesh, configuration.tokens)
        except CannotCheckError:  # a ValueError as well
            raise
        except PlacementError as error:  # no refusal of a layout: its declarations are wrong
            found.findings.append(replace(raised(error, packages, _names(mesh)), rule="X9"))
            return found
        except ValueError as error:  # ours among them: what a module says of a layout it cannot do
            found.refused = text_of(error)
            return found
        found.findings += misdeclared(built.module, mesh)
        if found.findings:
            return found  # what has no type could not be followed
        declared = declared_types(built.module)
        built = _as_from_a_model(built)
        _whole_placements(built, mesh, line_of(target))
        for tensor, placement in (*declared.values(), *built.tensors()):
            declare(tensor, placement, mesh)
        log.clear()
        try:
            _run(built, mesh, found, log, packages, whole)
            found.findings += _changed(declared, mesh)
        except (CannotCheckError, CheckerError):
            raise
        except Exception as error:  # what the checked code raises is its mistake, and shown
            found.findings.append(raised(error, packages, _names(mesh)))
        found.findings += found.record.findings
        found.findings += _raw(found.forward + found.backward or log)
        found.findings += escapes(found.record.lines)
    return found


def _whole_placements(built: Case, mesh: MoEMesh, at: str) -> None:
    for tensor, placement in built.tensors():
        missing = unsaid(placement, mesh)
        if missing:
            what = f"argument {describe(tensor)} is placed {placement}, which says nothing of "
            fix = f"{missing.split(', ')[0].upper()}[V]   # if the ranks have different ones there"
            why = "what the ranks of an axis hold decides what may be computed of it"
            raise cannot("Case", what + missing, why, fix, at=at)


def _as_from_a_model(built: Case) -> Case:
    """Its arguments as what came before the module made them: there is a gradient to go back."""
    args = []
    for arg in built.args:
        if isinstance(arg, Tensor):
            if arg.is_floating_point():
                arg = arg.detach().requires_grad_().clone()
            give(arg)
        args.append(arg)
    return Case(built.module, tuple(args), built.placements)


_SEED = 6_700_417  # a number that no program seeds with: another seed is one of the checked code


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def _run(
    built: Case,
    mesh: MoEMesh,
    found: Trace,
    log: list[Issued],
    packages: set[str],
    whole: Record | None,
) -> None:
    torch.manual_seed(_SEED)  # the target may have seeded, to make weights
    names = _names(mesh)
    typed = not any(isinstance(t, DTensor) for t in (*built.args, *built.module.parameters()))
    typed_axes = typed and any(a.size() > 1 for a in names)
    observer = Observer(packages, names, log, typed_axes, whole)
    found.record = observer.record
    with _checking(mesh, typed), observer, observer.of_subclasses():
        out = built.module(*built.args)
    found.forward = list(log)
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    found.shapes = tuple(tuple(t.shape) for t in results)
    log.clear()
    roots = [t for t in results if t.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
    found.backward = list(log)
    found.findings += _without_gradient(built.module, bool(roots))


def _names(mesh: MoEMesh) -> dict[MeshAxis, str]:
    """What the user calls each axis; where axes have the same ranks, the dense one's name."""
    return {axis(mesh, role): mesh[role].name for role in (*EXPERT, *DENSE)}


@contextmanager
def _checking(mesh: MoEMesh, typed: bool) -> Iterator[None]:
    """DTensors know their own placements, and spmd_types' checker does not know DTensors."""
    if not typed:
        yield
        return
    with checked(mesh):
        yield


def _without_gradient(module: nn.Module, any_root: bool) -> Iterator[Finding]:
    if not any_root:
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            yield finding(
                "X10",
                name,
                type(module).__name__,
                f"backward gives {name} no gradient",
                "somewhere between it and the output the graph is cut, so it never learns",
                "look for no_grad, detach, or a value read on the host, on its way to the output",
            )


def _changed(declared: Mapping[str, tuple[Tensor, Placement]], mesh: MoEMesh) -> Iterator[Finding]:
    """Parameters and buffers that have other types than they had."""
    for name, (tensor, placement) in declared.items():
        kinds = get_local_type(tensor)
        for k in placement:
            want = V if isinstance(k.kind, Shard) else k.kind
            have = kinds.get(axis(mesh, k.role))
            if mesh[k.role].size > 1 and have is not want:
                yield finding(
                    "X4",
                    name,
                    name,
                    f"it is {have!r} on {mesh[k.role]} after the step, and declared {k.kind!r}",
                    "an operation in place gave it values that differ from what every rank expects",
                    f"reduce what is added to it over {mesh[k.role].name} first",
                )


def _raw(issued: Iterable[Issued]) -> Iterator[Finding]:
    for one in issued:
        if one.raw and one.caller is not None and not allowed("raw", *one.caller):
            file, line = one.caller
            at = f"{short_path(file)}:{line}"
            yield finding(
                "X3",
                at,
                one.op,
                f"{one.op} of {list(one.shape)} is called directly",
                "a collective that is not typed moves tensors without the checker seeing it, "
                "and has no backward",
                "redistribute(x, axis, src=..., dst=...)",
                "# spmd: allow raw - <reason>   # on that line, where it moves no activations",
            )


# --- errors of the checked code -----------------------------------------------------------------


def raised(error: Exception, packages: set[str], names: Mapping[MeshAxis, str]) -> Finding:
    """The finding of an error that the checked code raises. One of the checker's own is raised."""
    at, where = place_of(error, packages)
    if _is_own(error, packages):
        raise checker_error(error, at) from error
    rule = "types" if isinstance(error, SpmdTypeError) else "crash"
    if isinstance(error, SpmdMoeError):
        return Finding(rule, at, at_line(str(error), at))
    text = text_of(error).strip().split("\n\n")[0].replace("\n", " ")
    if rule == "types":
        text = _in_our_words(text, names)
        why = "the kinds of the operands do not go together in this operation"
        return finding(rule, at, where, text, why, *_cures(text))
    kind = type(error).__name__
    said = f"{kind}: {text.rstrip('.')}"
    return finding(rule, at, where, said, "the module raises it in this configuration")


# What leads out of a kind that an operation does not take, by what spmd_types says of it.
_CURES = {
    "Invariant type": ["src=I, dst=R)   # of what is I there; its backward sums the gradient"],
    "Partial type": [
        "src=P, dst=R)   # of what is P there: an all-reduce",
        "src=P, dst=S(0))   # or a reduce-scatter",
    ],
    "expected input type P": ["declare_sum(t, axis)   # where t is made, if it is a part of a sum"],
}


def _cures(text: str) -> list[str]:
    """Calls that take an operand out of the kind that is in the way, on the axis in question."""
    named = re.search(r"axis '(\w+)'", text)
    axis = named[1] if named else "..."
    for words, calls in _CURES.items():
        if words in text:
            moved = (c for c in calls if c.startswith("src="))
            return [f"redistribute(t, {axis}, {c}" for c in moved] or calls
    return ["redistribute(t, axis, src=..., dst=...)   # of one of the operands"]


def _in_our_words(text: str, names: Mapping[MeshAxis, str]) -> str:
    """spmd_types' message with the user's names of the axes, up to its own advice."""
    for known, name in sorted(names.items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(f"axis {known}", f"axis '{name}'")
    text = text.replace("PerMeshAxisLocalSpmdType.", "")
    return text.partition(" Are you missing")[0].rstrip(". ")


# Files that run between the operations of the module.
_OWN = {f.__module__ for f in (run_operation, give, lineage, is_checked, escapes)}


def _is_own(error: Exception, packages: set[str]) -> bool:
    """Whether an error arises in what the checker does between operations."""
    if isinstance(error, SpmdMoeError | SpmdTypeError):
        return False
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_globals.get("__name__") in _OWN:
            return frame.f_code is not run_operation.__code__
        if is_checked(frame, packages):
            return False
    return False


def place_of(error: BaseException, packages: set[str]) -> tuple[str, str]:
    """The innermost line of the checked code that an error came through, and its function."""
    told: CodeType | None = getattr(error, "function", None)  # whose result is not as it says
    if told is not None:
        return f"{short_path(told.co_filename)}:{told.co_firstlineno}", told.co_qualname
    frames = list(traceback.walk_tb(error.__traceback__))
    for frame, line in reversed(frames):
        if is_checked(frame, packages):
            return f"{short_path(frame.f_code.co_filename)}:{line}", frame.f_code.co_qualname
    frame, line = frames[-1]
    return f"{short_path(frame.f_code.co_filename)}:{line}", frame.f_code.co_qualname
