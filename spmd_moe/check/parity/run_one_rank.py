"""A rank: the same steps as one process, on its own parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate

from spmd_moe.check.parity.axis_groups import Axes
from spmd_moe.check.parity.built_target import Question, Setup, prepare
from spmd_moe.check.parity.held_elements import (
    Part,
    Shape,
    axes_beside,
    by_shape,
    composed,
    local_of,
    of_dtensor,
    of_words,
)
from spmd_moe.check.parity.placement_words import Lies, lies, lies_of
from spmd_moe.check.parity.run_one_process import (
    Alone,
    Held,
    Observe,
    Step,
    backward,
    hold,
    make_optimizer,
    named_tensors,
    record_state,
    take_gradients,
)
from spmd_moe.check.parity.weights import Telling, fill, read_parts
from spmd_moe.check.target import cannot
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import Placement, placement_of
from spmd_moe.train.gradients import reduce_gradients


@final
@dataclass(slots=True)
class RankRun:
    """What a rank computed."""

    steps: list[Step]
    parts: dict[str, Part]
    scale: float  # of the gradients of inputs: a trainer that averages has a larger loss
    axes: Axes


def run_rank(
    question: Question,
    alone: Alone,
    table: Telling,
    known: Mapping[str, set[str]],
    observe: Observe,
) -> RankRun:
    with table.held():
        return _run_rank(question, alone, table, known, observe)


def _run_rank(
    question: Question,
    alone: Alone,
    table: Telling,
    known: Mapping[str, set[str]],
    observe: Observe,
) -> RankRun:
    setup = prepare(question)
    rank = dist.get_rank()
    setup.module.to(question.dtype)
    kind, over = setup.trainer_axes()
    if kind == "fully_shard":
        assert not isinstance(setup.mesh, MoEMesh)
        fully_shard(setup.module, mesh=setup.mesh[over[0]])
    parts = read_parts(setup, alone.weights, table, known)
    fill(setup, alone.weights, parts)
    given = _argument_parts(setup, alone, table)
    optimizer = make_optimizer(setup)
    scale = 1.0
    if kind in ("average", "fully_shard"):
        scale = float(len(setup.axes.joined(over, rank)))
    run = RankRun([], parts, scale, setup.axes)
    for number, upstream in enumerate(alone.upstream):
        args = take_gradients(_taken(setup, alone, given))
        with observe(setup.module, rank):
            outputs = named_tensors(setup.call(args))
            held = _output_parts(setup, outputs, alone, given, table, number)
            roots = [
                (outputs[name], _root(outputs[name], held[name], upstream[name] * scale, setup))
                for name in upstream
            ]
            backward(roots)
        step = Step()
        for name, out in outputs.items():
            step.tensors["output", name] = Held(local_of(out).detach().clone(), held[name])
        for n, (name, arg) in enumerate(zip(setup.arguments, args, strict=False)):
            if isinstance(arg, Tensor) and arg.requires_grad:
                back = _gradient_part(given[n], setup)
                step.tensors["gradient of input", name] = hold(arg.grad, back)
        _train(setup, parts, kind, over, table, number)
        record_state(setup, step, optimizer, parts)
        run.steps.append(step)
    return run


def read_rank(
    question: Question, alone: Alone, table: Telling, known: Mapping[str, set[str]]
) -> dict[str, Part]:
    """What a rank holds of each weight, without running anything."""
    with table.held():
        return read_parts(prepare(question), alone.weights, table, known)


def _argument_parts(setup: Setup, alone: Alone, table: Telling) -> dict[int, Part]:
    """What of each argument this rank has."""
    case, rank = setup.case, dist.get_rank()
    given = (*case.placements, *[None] * (len(case.args) - len(case.placements)))
    here = [tuple(local_of(a).shape) if isinstance(a, Tensor) else () for a in case.args]
    shapes = table.tell("arguments", here)
    found = {}
    for n, (arg, said) in enumerate(zip(case.args, given, strict=True)):
        if not isinstance(arg, Tensor):
            continue
        whole = alone.arguments[n]
        assert isinstance(whole, Tensor)
        what, shape = f"TARGET, {setup.arguments[n]}", tuple(whole.shape)
        placement = said if isinstance(said, Placement) else placement_of(said)
        if isinstance(arg, DTensor) and not isinstance(said, str):
            found[n] = of_dtensor(arg)
        elif isinstance(said, str) or placement is None:
            how = lies(said if isinstance(said, str) else "", setup.axes, what)
            found[n] = of_words(shape, how, rank, setup.axes, None, what)
            if isinstance(arg, DTensor):  # words say how it lies on the axes that it has not
                found[n] = composed(found[n], of_dtensor(arg))
        else:
            how = lies_of(placement, setup.axes.groups)
            every = [told[n] for told in shapes]
            found[n] = of_words(shape, how, rank, setup.axes, every, what)
    return found


def _taken(setup: Setup, alone: Alone, given: Mapping[int, Part]) -> list[object]:
    args: list[object] = []
    for n, arg in enumerate(alone.arguments):
        if isinstance(arg, Tensor) and n in given:
            mine, part = setup.case.args[n], given[n].of(arg)
            if any(setup.axes.coordinate(a, dist.get_rank()) for a in given[n].lies.sums):
                part = torch.zeros_like(part)
            if isinstance(mine, DTensor):
                part = DTensor.from_local(
                    part, mine.device_mesh, mine.placements, shape=mine.shape, stride=mine.stride()
                )
            arg = part
        args.append(arg)
    return args


def _gradient_part(part: Part, setup: Setup) -> Part:
    """What is R has a gradient that is a sum, and what is P one that is R."""
    sums = tuple(setup.axes.groups[axis] for axis in part.own)
    return Part(part.index, sums, lies=part.lies, read=part.read)


def _output_parts(
    setup: Setup,
    outputs: Mapping[str, Tensor],
    alone: Alone,
    given: Mapping[int, Part],
    table: Telling,
    number: int,
) -> dict[str, Part]:
    """How each output lies: by its type, by words, as the first argument, or by its shape."""
    here = {name: tuple(out.shape) for name, out in outputs.items()}
    told: list[dict[str, Shape]] = table.tell(("outputs", number), here)
    missing = sorted(set(alone.outputs) ^ set(here))
    if missing:
        what = f"output {missing[0]} is not on one process and on rank {dist.get_rank()} alike"
        raise cannot("TARGET", what, "outputs are compared by their names", "call=...")
    found = {}
    for name, out in outputs.items():
        whole, shapes = alone.outputs[name], [t[name] for t in told]
        if not isinstance(out, DTensor):
            found[name] = _plain_output(setup, name, whole, shapes, given, None)
        elif out.shape == whole.shape:
            found[name] = of_dtensor(out)
        else:
            beside = axes_beside(out, setup.axes)
            outer = _plain_output(setup, name, whole, shapes, given, beside)
            found[name] = composed(outer, of_dtensor(out))
    return found


def _plain_output(
    setup: Setup,
    name: str,
    whole: Tensor,
    shapes: Sequence[Shape],
    given: Mapping[int, Part],
    among: Sequence[str] | None,
) -> Part:
    """On the axes `among`, or on all."""
    shape, rank = tuple(whole.shape), dist.get_rank()
    out, what = setup.case.out, f"TARGET, output {name}"
    words = out if isinstance(out, str) else None
    if isinstance(out, Mapping):
        words = next((w for key, w in out.items() if fnmatchcase(name, key)), None)
    if words is not None:
        how = lies(words, setup.axes, what)
        return of_words(shape, how, rank, setup.axes, None if how.sums else shapes, what)
    for part in given.values():
        cuts = tuple(c for c in part.lies.cuts if among is None or c.axis in among)
        how = Lies(cuts, own=part.lies.own)
        if any(c.dim >= len(shape) or shapes[rank][c.dim] > shape[c.dim] for c in cuts) or not cuts:
            continue
        if _fits(setup, shape, how, shapes):
            return of_words(shape, how, rank, setup.axes, shapes, what)
    fix = "out={{{what!r}: {words!r}}}"
    how = by_shape(name, whole.dtype, shape, shapes, setup.axes, among, fix)
    if not how.cuts and given:  # the whole, as the first argument is
        first = next(iter(given.values()))
        if not first.lies.cuts:
            how = Lies(own=first.lies.own)
    return of_words(shape, how, rank, setup.axes, shapes, what)


def _fits(setup: Setup, shape: Shape, how: Lies, shapes: Sequence[Shape]) -> bool:
    """Every rank's shape is that of its part, by the chunks that ranks have."""
    axes = setup.axes
    for dim in {c.dim for c in how.cuts}:
        names = [c.axis for c in how.cuts if c.dim == dim and axes.size(c.axis) > 1]
        for rank in range(axes.world):
            if sum(shapes[r][dim] for r in axes.joined(names, rank)) != shape[dim]:
                return False
    rest = [d for d in range(len(shape)) if d not in {c.dim for c in how.cuts}]
    return all(len(s) == len(shape) and all(s[d] == shape[d] for d in rest) for s in shapes)


def _root(out: Tensor, part: Part, upstream: Tensor, setup: Setup) -> Tensor:
    """The gradient that this rank is given for an output."""
    mine = part.of(upstream)
    if isinstance(out, DTensor):
        kinds = [Replicate() if isinstance(p, Partial) else p for p in out.placements]
        return DTensor.from_local(
            mine.to(out.dtype), out.device_mesh, kinds, shape=out.shape, stride=out.stride()
        )
    if any(setup.axes.coordinate(axis, dist.get_rank()) for axis in part.own):
        mine = torch.zeros_like(mine)  # each rank's use counts, and another one used it
    return mine


# --- the trainer --------------------------------------------------------------------------------


def _train(
    setup: Setup,
    parts: Mapping[str, Part],
    kind: str,
    over: Sequence[str],
    table: Telling,
    step: int,
) -> None:
    """What follows backward; sums are over the ranks that hold the same part."""
    if kind == "hook":
        assert callable(setup.trainer)
        setup.trainer(setup.module, setup.mesh)
    elif kind == "ours":
        assert isinstance(setup.mesh, MoEMesh)
        reduce_gradients(setup.module, setup.mesh)
    own = {n: () if kind == "ours" else part.own for n, part in parts.items()}
    summing = kind in ("sum", "average")
    if not summing and not any(own.values()):
        return
    rank, axes = dist.get_rank(), setup.axes
    named = {setup.name(n): p for n, p in setup.module.named_parameters() if p.requires_grad}
    plain = {n: p for n, p in named.items() if not isinstance(p, DTensor)}
    # FSDP and DTensor parameters on these axes have placements of their own to say what is due.
    local = {n: p for n, p in named.items() if isinstance(p, DTensor) and summing}
    mine = {n: (_copy(p.grad), _key(parts[n])) for n, p in (plain | local).items()}
    every = table.tell(("gradients", step), mine)
    for name, p in (plain | local).items():
        along = [*own[name], *(over if summing else ())]
        group = axes.joined(along, rank)
        same = [every[r][name] for r in group if name in every[r]]
        grads = [g for g, key in same if g is not None and key == mine[name][1]]
        if grads:
            total = torch.stack(grads).sum(0) if len(grads) > 1 else grads[0]
            if kind == "average":
                total = total / len(axes.joined(over, rank))
            if isinstance(p, DTensor) and isinstance(p.grad, DTensor):
                local_of(p.grad).copy_(total)
            elif isinstance(p, DTensor):  # nothing on this rank used it
                places = p.device_mesh, p.placements
                p.grad = DTensor.from_local(
                    total.clone(), *places, shape=p.shape, stride=p.stride()
                )
            else:
                p.grad = total.clone()


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else local_of(grad).detach().clone()


def _key(part: Part) -> object:
    """Alike on ranks that hold the same part."""
    if part.index is None:
        return None
    flat = part.index.reshape(-1)
    return (tuple(part.index.shape), int(flat.sum()), int(flat[0]) if flat.numel() else -1)
