"""The sanitizer of a running job: every boundary, parameter and gradient of some of its steps.

A step ends when the optimizer is about to use the gradients. In a watched step, annotated functions
and parameters are hooked, and each tensor that is declared R or I is hashed; at the end of the step
the ranks compare their hashes. Between watched steps no hook is left.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from spmd_moe.core.declare_placements import declared
from spmd_moe.core.errors import ConfigError, describe, explain, users_line
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.placement import Placement
from spmd_moe.sanitize.compare_ranks import ROLES, Seen, as_stored, compare, same_on
from spmd_moe.sanitize.gradient_sums import Gradients, Named
from spmd_moe.sanitize.observe_functions import Boundaries
from spmd_moe.sanitize.tensor_digest import fingerprint

VARIABLE = "SPMD_MOE_SANITIZE"
_MANY = 10_000  # hashes that may accumulate in a job without backward


@contextmanager
def sanitize(
    model: nn.Module, mesh: MoEMesh, rate: float | None = None, *, step: int = 0
) -> Iterator[Sanitizer]:
    """Watch some steps of a running job: the first tensor that contradicts its type raises.

    A context manager around the training loop. Every rank must enter it, with the same arguments.

    Args:
        model: The model.
        mesh: The mesh.
        rate: The share of steps that are watched, from 0 (none) to 1; the first step is watched.
            Default: the environment variable `SPMD_MOE_SANITIZE`, or 0.
        step: The number of the first step, for messages.

    Returns:
        A context manager; it yields the sanitizer, with `reduced()` and `step()`.

    Raises:
        SanitizerError: On all ranks, if ranks hold different values that must be equal.
        ConfigError: `rate` is out of range, or another sanitizer is active.

    Example:
        >>> import torch
        >>> from spmd_moe import sanitize
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> with sanitize(layer, mesh, rate=0.1):
        ...     layer(torch.ones(3, 8)).hidden.sum().backward()
        ...     optimizer.step()
    """
    check_mesh("sanitize", mesh)
    watcher = Sanitizer(model, mesh, _period(rate), step)
    with watcher.at_work():
        yield watcher


@final
class Sanitizer:
    """The object that `sanitize` yields; its methods mark events that it cannot observe."""

    def __init__(self, model: nn.Module, mesh: MoEMesh, period: int, step: int) -> None:
        self.model, self.mesh, self.period, self.now = model, mesh, period, step
        self.first, self.watching = step, False
        self.axes = [mesh[role] for role in ROLES if mesh[role].size > 1]
        self._seen: list[Seen] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._intercepted = ExitStack()
        self._leader: weakref.ref[Optimizer] | None = None
        self._settled = False

    def reduced(self) -> None:
        """Check the gradients now, because they change before the optimizer step (clipping)."""
        if self.watching and not self._settled:
            self._look_at_gradients(users_line())

    def step(self) -> None:
        """End a step, in a loop without a `torch.optim` optimizer."""
        if self.period and self.axes:
            self._end_of_step(users_line(), gradients=False)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        if self.axes:
            self.mesh.check_ranks_agree("sanitize", {"1 in": self.period, "step": self.now})
        if not (self.axes and self.period):
            yield
            return
        self.device = self._where_model_is()
        global _at_work
        if _at_work:
            _refuse(
                "another sanitizer is active",
                "a function is watched by one sanitizer at a time",
                "leave the other `with sanitize(...)` first",
            )
        _at_work = True
        self._prepare()
        handle = register_optimizer_step_pre_hook(self._before_optimizer)
        try:
            self._open()
            yield
            # Also without hashes on this rank: another rank may have some to compare.
            compare(self._seen, self.mesh, self.now, self.device)
        finally:
            _at_work = False
            handle.remove()
            self._close()

    # --- a step ---------------------------------------------------------------------------------

    def _prepare(self) -> None:
        parameters: list[Named] = []
        self._state: list[tuple[str, nn.Module, str, Placement]] = []
        for prefix, module in self.model.named_modules():
            own = declared(module)
            for name, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if name in own:
                    full = f"{prefix}.{name}" if prefix else name
                    self._state.append((full, module, name, own[name]))
                    if isinstance(tensor, nn.Parameter):
                        parameters.append((full, tensor, own[name]))
        self._gradients = Gradients(parameters, self.mesh)
        self._boundaries = Boundaries(self.model, self._matters)
        self._ours = {id(parameter) for parameter in self.model.parameters()}

    def _where_model_is(self) -> torch.device:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device(self.mesh.dense.device_type)

    def _matters(self, placement: Placement) -> bool:
        return any(same_on(placement, axis) for axis in self.axes)

    def _open(self) -> None:
        if (self.now - self.first) % self.period:
            return
        self.watching, self._settled = True, False
        self._intercepted.enter_context(self._boundaries.observed(self._at_boundary))
        self._gradients.open()
        self._handles.append(self.model.register_forward_pre_hook(self._before_model))

    def _close(self) -> None:
        self.watching = False
        self._intercepted.close()
        self._gradients.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        self._known.clear()

    def _before_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """End the step, if this is the first optimizer with parameters of the model."""
        leader = self._leader() if self._leader else None
        if leader is None:
            has = (id(p) for group in optimizer.param_groups for p in group["params"])
            if self._ours.isdisjoint(has):
                return
            self._leader = weakref.ref(optimizer)
        elif leader is not optimizer:
            return
        self._end_of_step(users_line(), gradients=True)

    def _end_of_step(self, line: str, *, gradients: bool) -> None:
        if self.watching:
            if gradients and not self._settled:
                self._look_at_gradients(line)
            else:
                compare(self._seen, self.mesh, self.now, self.device)
            self._close()
        self.now += 1
        self._open()

    def _look_at_gradients(self, line: str) -> None:
        self._settled = True
        self._seen += self._gradients.seen(line)
        compare(self._seen, self.mesh, self.now, self.device)
        self._seen.clear()
        if self._gradients.parameters:
            self._gradients.check_sums(self.now, line)

    # --- hashes ---------------------------------------------------------------------------------

    def _before_model(self, model: nn.Module, args: Any) -> None:
        """Hash parameters and buffers before the forward."""
        if len(self._seen) > _MANY:
            compare(self._seen, self.mesh, self.now, self.device)
            self._seen.clear()
        line = users_line(sys._getframe(1))
        for full, module, name, placement in self._state:
            self._see("state", f"'{full}'", "value", getattr(module, name), placement, line)

    def _at_boundary(self, *seen: Any) -> None:
        self._see("boundary", *seen)

    def _see(
        self, what: str, where: str, name: str, x: Tensor, placement: Placement, line: str
    ) -> None:
        x, placement = as_stored(x, placement, self.mesh)
        if self._matters(placement):
            seen = Seen(what, where, name, describe(x), placement, line, self._hash(x))
            self._seen.append(seen)

    def _hash(self, x: Tensor) -> Tensor:
        """The hash of `x`; cached while `x` passes several boundaries unchanged."""
        if x.is_inference():  # has no version
            return fingerprint(x)
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1] == x._version:
            return known[2]
        found = fingerprint(x)
        self._known[id(x)] = weakref.ref(x), x._version, found
        return found


_at_work = False


def _period(rate: float | None) -> int:
    """One step in this many is watched; 0 for none."""
    said: object = os.environ.get(VARIABLE, "0") if rate is None else rate
    try:
        chosen = float(str(said))
    except ValueError:
        chosen = -1.0
    if not 0.0 <= chosen <= 1.0:
        _refuse(
            f"the rate is {said!r}; it must be a number from 0 to 1",
            "it is the fraction of steps that are watched",
            f"rate=0.1   # or {VARIABLE}=0.1, for one step in ten",
        )
    return round(1 / chosen) if chosen else 0


def _refuse(what: str, why: str, fix: str) -> None:
    raise ConfigError(explain("sanitize", what, why=why, fixes=[fix]))
