"""Real values on every rank, compared with one process that has everything (X11).

The target is built once alone and once on every rank of a world of threads. Each rank is given its
part of the lone module's weights and inputs, as their placements say. Then all types are put to the
test: what is R or I must be equal on its ranks, wherever it occurs; outputs and gradients, put
together as their types say, must be those of the lone process. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast, final

import torch
import torch.distributed as dist
from spmd_types import get_local_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten_with_path

from spmd_moe.check.check_declarations import declared_types
from spmd_moe.check.findings import Finding, finding
from spmd_moe.check.layouts import Layout
from spmd_moe.check.mirror_world import mirror_world
from spmd_moe.check.observer import Observer
from spmd_moe.check.record import Point, Record
from spmd_moe.check.signatures import axis, checked, declare
from spmd_moe.check.target import CannotCheckError, Case, Target, build, cannot, line_of
from spmd_moe.check.thread_ranks import RanksError, threaded
from spmd_moe.check.trace import raised
from spmd_moe.check.whole_tensors import (
    SMALL,
    Kinds,
    NotAlikeError,
    PartsError,
    distance,
    gradient,
    joined,
    kinds_of,
    parts,
)
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.messages import at_line, kinds_text
from spmd_moe.core.placement import DENSE, EXPERT, Kind, R, Role, V

CLOSE = 1e-5  # of float64, parts of which a module may compute in float32
# What reads a shape and no values, which may be uninitialized memory.
SHAPE_ALONE = {f"{word}_like" for word in ("ones", "zeros", "empty", "full", "rand", "randn")} | {
    f"new_{word}" for word in ("ones", "zeros", "empty", "full", "tensor")
}


@final
@dataclass(slots=True)
class Run:
    """What one process computed: outputs by name, gradients by name, and what was seen inside."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, dict[Role, Kind]] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    record: Record = field(default_factory=Record)


@final
@dataclass(slots=True)
class Setup:
    """What all ranks share: the lone module's tensors, and what each rank has told of its own."""

    whole: dict[str, Tensor]
    kinds: dict[str, Kinds] = field(default_factory=dict)
    upstream: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Size] = field(default_factory=dict)
    shapes: dict[str, dict[int, torch.Size]] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)  # outputs that each rank has a whole of its own of


def check_values(
    target: Target, layout: Layout, tokens: int, packages: set[str], seconds: float
) -> Iterator[Finding]:
    """Compare all ranks of a layout with one process; inside `signatures(packages)`."""
    with mirror_world(1):  # the lone process' own raw collectives need a group, too
        yield from _check_values(target, layout, tokens, packages, seconds)


def _check_values(
    target: Target, layout: Layout, tokens: int, packages: set[str], seconds: float
) -> Iterator[Finding]:
    lone = build(target, Layout().mesh(), tokens * layout.dp * layout.cp)
    if any(isinstance(a, DTensor) for a in lone.args):
        return  # they have no types that could be put to the test
    module, args = _wide(lone)
    setup = Setup(_tensors(module, args))
    try:
        single = Run(_named(module(*args)))
    except Exception as error:
        yield raised(error, packages, {})
        return
    setup.upstream.update(_upstream(single.outputs))
    setup.outputs.update({name: out.shape for name, out in single.outputs.items()})
    try:
        runs = threaded(
            layout.world, _rank, target, layout, tokens, packages, setup, seconds=seconds
        )
    except RanksError as error:
        yield _failed(error, packages)
        return
    upstream = {name: g for name, g in setup.upstream.items() if name not in setup.apart}
    _backward(single, upstream, module, args)
    yield from _unlike(runs, layout)
    outputs = {name: out for name, out in single.outputs.items() if name not in setup.apart}
    yield from _compare("output", outputs, [r.outputs for r in runs], runs[0].kinds, layout)
    kinds = {name: gradient(k) for name, k in setup.kinds.items()}
    found = [r.gradients for r in runs]
    yield from _compare("gradient of", single.gradients, found, kinds, layout)


# --- one process --------------------------------------------------------------------------------


def _wide(built: Case) -> tuple[nn.Module, list[object]]:
    """In float64, with weights that are not dead, and inputs that take a gradient."""
    module = built.module.to(torch.float64)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=random, device="cpu") * 0.3)
    args: list[object] = []
    for arg in built.args:
        if isinstance(arg, Tensor) and arg.is_floating_point():
            arg = arg.detach().to(torch.float64).requires_grad_()
        args.append(arg)
    return module, args


def _tensors(module: nn.Module, args: Sequence[object]) -> dict[str, Tensor]:
    found = _leaves(module, args) | dict(module.named_buffers())
    return {name: t.detach().clone() for name, t in found.items()}


def _leaves(module: nn.Module, args: Sequence[object]) -> dict[str, Tensor]:
    """Parameters and inputs, by name."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    found.update({_argument(n): a for n, a in enumerate(args) if isinstance(a, Tensor)})
    return found


def _argument(number: int) -> str:
    return f"argument {number}"


def _upstream(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random gradient for each output that takes one."""
    random = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(out.shape, generator=random, dtype=torch.float64, device="cpu")
        for name, out in outputs.items()
        if out.requires_grad
    }


def _backward(
    run: Run, upstream: Mapping[str, Tensor], module: nn.Module, args: Sequence[object]
) -> None:
    roots = [(run.outputs[name], grad) for name, grad in upstream.items()]
    roots = [(out, grad.to(out.dtype)) for out, grad in roots if out.requires_grad]
    if roots:
        torch.autograd.backward([out for out, _ in roots], [grad for _, grad in roots])
    leaves = _leaves(module, args)
    run.gradients = {n: t.grad for n, t in leaves.items() if t.grad is not None}


def _named(out: object) -> dict[str, Tensor]:
    leaves, _ = tree_flatten_with_path(out)
    named = {"".join(map(str, path)) or "result": leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}


# --- a rank -------------------------------------------------------------------------------------


def _rank(target: Target, layout: Layout, tokens: int, packages: set[str], setup: Setup) -> Run:
    rank, mesh = dist.get_rank(), layout.mesh()
    built = build(target, mesh, tokens)
    module, args = _wide(built)
    try:
        _take_parts(built, module, args, setup, layout, rank)
    except CannotCheckError as error:
        raise CannotCheckError(at_line(str(error), line_of(target))) from None
    names = {axis(mesh, role): mesh[role].name for role in (*EXPERT, *DENSE)}
    dist.barrier()  # all axes are known now: spmd_types' list of them must not grow from here on
    for tensor, placement in declared_types(module).values():
        declare(tensor, placement, mesh)
    placements = [placement for _, placement in built.tensors()]
    for arg, placement in zip((a for a in args if isinstance(a, Tensor)), placements, strict=True):
        declare(arg, placement, mesh)
    observer = Observer(packages, names, [], typed=layout.world > 1)
    run = Run(record=observer.record)
    with checked(mesh), observer:
        run.outputs = _named(module(*args))
    run.kinds = {name: _kinds(out, mesh) for name, out in run.outputs.items()}
    _set_apart(run, setup, layout)
    upstream = {}
    for name in sorted(setup.upstream.keys() - setup.apart):
        kinds = gradient(run.kinds[name])
        like = run.outputs[name].detach()
        upstream[name] = _my_part(f"d {name}", setup.upstream[name], like, kinds, setup, layout)
    _backward(run, upstream, module, args)
    run.outputs = {name: out.detach().clone() for name, out in run.outputs.items()}
    return run


def _take_parts(
    built: Case, module: nn.Module, args: list[object], setup: Setup, layout: Layout, rank: int
) -> None:
    """Fill this rank's parameters, buffers and inputs with its parts of the lone ones."""
    kinds = {name: kinds_of(p) for name, (_, p) in declared_types(module).items()}
    numbers = (n for n, a in enumerate(args) if isinstance(a, Tensor))
    for number, (_, placement) in zip(numbers, built.tensors(), strict=True):
        kinds[_argument(number)] = kinds_of(placement)
    own = _leaves(module, args) | dict(module.named_buffers())
    if rank == 0:
        setup.kinds.update({name: kinds.get(name, _everywhere(R)) for name in own})
    for name in sorted(own):
        placed = kinds.get(name, _everywhere(R))
        try:
            part = _my_part(name, setup.whole[name], own[name], placed, setup, layout)
        except PartsError as error:
            why = "with values, all ranks together get what one process gets for as many tokens"
            share = "rows = ShardShape.even(tokens, tp.size).sizes[tp.rank]   # of a target, on tp"
            fixes = [share, "leave --values out"]
            if name in kinds and V in placed.values() and name in module.state_dict():
                why = "V does not say how what the ranks store belongs together"
                fixes[0] = (
                    f"{name}: ...[S[0]]   # one tensor for all experts, with a dim of experts"
                )
            raise cannot("TARGET", f"{name}: {error}", why, *fixes) from None
        with torch.no_grad():
            own[name].copy_(part)


def _everywhere(kind: Kind) -> dict[Role, Kind]:
    return dict.fromkeys(DENSE, kind)


def _my_part(
    name: str, whole: Tensor, like: Tensor, kinds: Kinds, setup: Setup, layout: Layout
) -> Tensor:
    """This rank's part of a whole, cut by the sizes that all ranks have."""
    setup.shapes.setdefault(name, {})[dist.get_rank()] = like.shape
    dist.barrier()
    shapes = [setup.shapes[name][rank] for rank in range(layout.world)]
    part = parts(whole, shapes, kinds, layout)[dist.get_rank()]
    if part.shape != like.shape:
        said = kinds_text(kinds.items())
        raise PartsError(f"{said} of it is {list(part.shape)}, and there is {list(like.shape)}")
    return part


def _kinds(out: Tensor, mesh: MoEMesh) -> dict[Role, Kind]:
    """Of an output, by its own types, on the presentation that these are of."""
    have = get_local_type(out)
    dense = all(axis(mesh, role) in have for role in DENSE if mesh[role].size > 1)
    return {role: have.get(axis(mesh, role), R) for role in (DENSE if dense else EXPERT)}


def _set_apart(run: Run, setup: Setup, layout: Layout) -> None:
    """Outputs that are V and no rows, such as counts of each rank's own: they have no whole."""
    for name, whole in setup.outputs.items():
        setup.shapes.setdefault(name, {})[dist.get_rank()] = run.outputs[name].shape
        dist.barrier()
        varies = any(k is V and layout.sizes[role] > 1 for role, k in run.kinds[name].items())
        if varies and all(shape == whole for shape in setup.shapes[name].values()):
            setup.apart.add(name)
    dist.barrier()


# --- comparing ----------------------------------------------------------------------------------


def _compare(
    what: str,
    want: Mapping[str, Tensor],
    got: Sequence[Mapping[str, Tensor]],
    kinds: Mapping[str, Kinds],
    layout: Layout,
) -> Iterator[Finding]:
    for name, value in want.items():
        present = [run.get(name) for run in got]
        if any(t is None for t in present):
            yield _wrong(f"{what} {name}", "it is there in one process, and not on every rank")
            continue
        tensors = cast(list[Tensor], present)
        try:
            whole = joined(tensors, kinds[name], layout)
        except NotAlikeError as error:
            yield _wrong(f"{what} {name}", str(error))
            continue
        off = distance(whole.detach().reshape(-1), value.detach().reshape(-1))
        if off > CLOSE:
            said = kinds_text((r, k) for r, k in kinds[name].items() if layout.sizes[r] > 1)
            yield _wrong(
                f"{what} {name}", f"as {said} it is not what one process computes, by {off:.2g}"
            )


def _wrong(name: str, what: str) -> Finding:
    return finding(
        "X11",
        name,
        name,
        what,
        "a type that is not true of the values makes every check that rests on it worthless",
        "look for the first sum, cut or exchange on its way that does not do what its type says",
    )


def _unlike(runs: Sequence[Run], layout: Layout) -> Iterator[Finding]:
    """The first place where what is R or I on an axis differs between its ranks."""
    for point, passes in runs[0].record.points.items():
        if point.op in SHAPE_ALONE:
            continue
        twins = [run.record.points.get(point, []) for run in runs]
        for number, seen in enumerate(passes):
            for position, operand in enumerate(seen.operands):
                alike = (
                    r for r in (*DENSE, *EXPERT) if dict(operand.types).get(r.name) in ("R", "I")
                )
                for role in alike:
                    there = [r for r in _group(layout, role) if number < len(twins[r])]
                    totals = [twins[r][number].operands[position].total for r in there]
                    if max(totals) - min(totals) > CLOSE * max(SMALL, *map(abs, totals)):
                        yield _differs(point, position, role, there)
                        return


def _differs(point: Point, position: int, role: Role, ranks: list[int]) -> Finding:
    return finding(
        "X11",
        point.at,
        point.op,
        f"its operand {position} is the same on all ranks of {role} by its type, "
        f"and differs on ranks {ranks}",
        "a type that is not true of the values makes every check that rests on it worthless",
        "look at what made it: a cut, a sum or an exchange that does not do what its type says",
    )


def _group(layout: Layout, role: Role) -> list[int]:
    """The ranks that share an axis with rank 0."""
    others = [r for r in (DENSE if role in DENSE else EXPERT) if r is not role]
    places = ((rank, layout.place(rank)) for rank in range(layout.world))
    return [rank for rank, place in places if not any(place[other] for other in others)]


def _failed(error: RanksError, packages: set[str]) -> Finding:
    if not error.errors or all(isinstance(e, SystemExit) for e in error.errors.values()):
        return finding(
            "X5",
            "ranks",
            "ranks",
            f"ranks {error.stuck} wait for each other without end",
            "they do not issue the same collectives in the same order",
            "issue each collective on every rank, with no rows where there are none",
        )
    first = error.errors[min(error.errors)]
    if isinstance(first, CannotCheckError):
        raise first
    if isinstance(first, PartsError):
        return _wrong("output", f"of an output, {first}")
    if not isinstance(first, Exception):
        raise first
    return raised(first, packages, {})
