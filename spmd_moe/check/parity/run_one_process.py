"""One process: its steps, and what comes of them.

A step is forward, backward from a random gradient, the trainer's work, and the optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten_with_path

from spmd_moe.check.parity.built_target import Question, Setup, prepare, tensors_of, whole_arguments
from spmd_moe.check.parity.held_elements import (
    Part,
    local_of,
    of_dtensor,
    whole_of,
)
from spmd_moe.check.parity.weights import enliven, fill
from spmd_moe.check.target import cannot

# Called around each forward and backward of one process (rank None) and of each rank, with the
# module: what wants to see the inside of both runs enters here.
Observe: TypeAlias = Callable[[nn.Module, int | None], AbstractContextManager[object]]
RATE = 0.05  # of the optimizer between two steps


def unobserved(module: nn.Module, rank: int | None) -> AbstractContextManager[object]:
    return nullcontext()


@final
@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that a rank holds, and which part of the whole it stands for."""

    value: Tensor
    part: Part


@final
@dataclass(slots=True)
class Step:
    """Tensors by kind (output, gradient of input, ..) and name; None: it has none."""

    tensors: dict[tuple[str, str], Held | None] = field(default_factory=dict)


@final
@dataclass(slots=True)
class Alone:
    """What one process has and computes."""

    setup: Setup
    weights: dict[str, Tensor]
    arguments: list[object]
    upstream: list[dict[str, Tensor]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    low: frozenset[torch.dtype] = frozenset()  # the low precisions that it computes in
    # By kind and name, the effect of rounding: the median distance, and the largest.
    rounding: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)


# --- one process --------------------------------------------------------------------------------


def run_alone(
    question: Question,
    steps: int,
    observe: Observe,
    weights: Mapping[str, Tensor] | None = None,
    arguments: Sequence[object] | None = None,
) -> Alone:
    """The target on one process; with weights and arguments that are given, if they are."""
    first = arguments is None
    setup = prepare(question)
    setup.module.to(question.dtype)
    found = {setup.name(name): t for name, t in enliven(setup.module).items()}
    if weights is not None:
        fill(setup, weights, {name: Part() for name in found})
        found = {name: weights[name] for name in found}
    alone = Alone(
        setup,
        found,
        list(whole_arguments(setup, question.dtype) if arguments is None else arguments),
    )
    optimizer = make_optimizer(setup)
    random = torch.Generator().manual_seed(2)
    for number in range(steps):
        args = take_gradients(alone.arguments)
        precisions = LowPrecisions()
        # The run whose inputs are given is a second one, of which nothing is observed.
        with observe(setup.module, None) if first else precisions:
            outputs = {n: whole_of(out) for n, out in named_tensors(setup.call(args)).items()}
            _check_outputs(outputs)
            upstream = {
                name: torch.randn(out.shape, generator=random, dtype=torch.float64)
                for name, out in outputs.items()
                if out.requires_grad
            }
            backward([(outputs[name], grad) for name, grad in upstream.items()])
        if number == 0:
            alone.outputs = {name: out.detach().clone() for name, out in outputs.items()}
        alone.upstream.append(upstream)
        step = Step()
        for name, out in outputs.items():
            step.tensors["output", name] = Held(out.detach().clone(), Part())
        for name, arg in zip(setup.arguments, args, strict=False):
            if isinstance(arg, Tensor) and arg.requires_grad:
                step.tensors["gradient of input", name] = hold(arg.grad)
        alone.low = frozenset(precisions.seen)
        record_state(setup, step, optimizer, {})
        alone.steps.append(step)
    return alone


class LowPrecisions(TorchFunctionMode):
    """Notes which calls give a low precision."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.bfloat16, torch.float16):
            self.seen.add(out.dtype)
        return out


def _check_outputs(outputs: Mapping[str, Tensor]) -> None:
    if not outputs:
        why = "outputs and gradients are what is compared"
        raise cannot("TARGET", "the call returns no tensor", why, "call=lambda x: module(x)[0]")


@final
class Descent:
    """Gradient descent; torch's own optimizers import its compiler, which takes a second."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-RATE)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def make_optimizer(setup: Setup) -> Optimizer | Descent | None:
    parameters = [p for p in setup.module.parameters() if p.requires_grad]
    if not parameters:
        return None
    make = setup.case.optimizer
    return make(parameters) if make else Descent(parameters)


def take_gradients(args: Sequence[object]) -> list[object]:
    """Copies that take a gradient."""
    found: list[object] = []
    for arg in args:
        if isinstance(arg, Tensor):
            arg = arg.detach().clone()
            if arg.is_floating_point():
                arg.requires_grad_()
        found.append(arg)
    return found


def named_tensors(out: object) -> dict[str, Tensor]:
    """The tensors of a result, by their paths in it."""
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        leaves, _ = tree_flatten_with_path(out)
        if len(leaves) == 1 and leaves[0][1] is out:  # a dataclass that pytree does not know
            out = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    leaves, _ = tree_flatten_with_path(out)
    named = {"".join(map(str, path)) or "result": leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}


def backward(roots: Sequence[tuple[Tensor, Tensor]]) -> None:
    roots = [(out, grad.to(out.dtype)) for out, grad in roots if out.requires_grad]
    if roots:
        torch.autograd.backward([out for out, _ in roots], [grad for _, grad in roots])


def record_state(
    setup: Setup, step: Step, optimizer: Optimizer | Descent | None, parts: Mapping[str, Part]
) -> None:
    """Gradients, then buffers and parameters as the optimizer leaves them."""
    for here, p in setup.module.named_parameters():
        name = setup.name(here)
        if p.requires_grad:
            step.tensors["gradient of", name] = hold(p.grad, parts.get(name))
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    for here, t in tensors_of(setup.module).items():
        name = setup.name(here)
        kind = "parameter after the step" if isinstance(t, nn.Parameter) else "buffer"
        step.tensors[kind, name] = hold(t, parts.get(name))


def hold(t: Tensor | None, part: Part | None = None) -> Held | None:
    if t is None:
        return None
    part = of_dtensor(t) if isinstance(t, DTensor) else part or Part()
    return Held(local_of(t).detach().clone(), part)
