"""Check that each gradient is summed once over the ranks, and scaled like all others.

A hook records a sketch of each gradient during backward: a few sums that are linear in it. The
gradient of an R parameter is P, so the sketch of what the optimizer gets must be the sum of the
ranks' sketches. A scale (clipping, averaging) must be the same for all parameters and at most 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
import torch.nn.functional as fn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spmd_moe.core.errors import describe, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import P, Placement, R, Role
from spmd_moe.core.redistribute import redistribute
from spmd_moe.sanitize.compare_ranks import (
    NONE,
    ROLES,
    Seen,
    as_stored,
    by_rank,
    first_of,
    gather_all,
    is_stored_in_parts,
    tell,
)
from spmd_moe.sanitize.tensor_digest import COLUMNS, fingerprint, sketch

_SLACK = 0.05  # above rounding of bfloat16 sums, far below the smallest mistake
_NO_PART = 1e-3  # of the parts' norm; a smaller sum is rounding
_PPM = 1_000_000

Named = tuple[str, nn.Parameter, Placement]


@final
class Gradients:
    """The gradients of the parameters that have a placement."""

    def __init__(self, parameters: Sequence[Named], mesh: MoEMesh) -> None:
        self.parameters, self.mesh = parameters, mesh
        self._parts: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        self._parts.clear()
        for number, (_, parameter, _) in enumerate(self.parameters):
            if parameter.requires_grad and not is_stored_in_parts(parameter):

                def caught(grad: Tensor, number: int = number) -> None:
                    self._catch(number, grad)

                self._handles.append(parameter.register_hook(caught))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _catch(self, number: int, grad: Tensor) -> None:
        part, before = sketch(grad), self._parts.get(number)
        if before is not None and self.parameters[number][1].grad is not None:
            part = part + before  # one of several backward passes
        self._parts[number] = part

    def seen(self, line: str) -> list[Seen]:
        """The current gradients, for comparison along the axes."""
        found = []
        for name, parameter, placement in self.parameters:
            grad = parameter.grad
            # A DTensor's gradient has placements of its own: of Partial, ranks hold summands.
            stored = parameter if grad is None or not is_stored_in_parts(grad) else grad
            found.append(_seen(name, grad, *as_stored(stored, placement, self.mesh), line))
        return found

    def check_sums(self, step: int, line: str) -> None:
        """Raise on all ranks if a gradient is not the sum of its parts, scaled like all others."""
        caught = [n for n in sorted(self._parts) if self.parameters[n][1].grad is not None]
        device = self.parameters[0][1].device
        scale, strays = self._scales(caught, device)
        known = scale.isfinite()
        low = torch.where(known, scale, torch.inf).amin()
        middle = scale.nanmedian()
        high = torch.where(known, scale, -torch.inf).amax()
        verdict = _as_ints(torch.stack([low, middle, high]))
        mine = [verdict.new_tensor(dist.get_rank()), *verdict, strays.any().to(torch.int64)]
        rows = by_rank(gather_all(torch.stack(mine).unsqueeze(0), self.mesh))
        lows, middles, highs = ([row[i] for row in rows if row[3] > 0] for i in (1, 2, 3))
        stray = any(row[4] for row in rows)
        if not stray and (not highs or _fair(min(lows), max(highs))):
            return
        usual = sorted(middles)[len(middles) // 2] / _PPM if middles else 1.0
        wrong = strays if stray else (known & ((scale - min(usual, 1.0)).abs() > _SLACK * usual))
        index = torch.tensor([*caught, NONE], device=device)
        key = torch.where(wrong, index, NONE).amin().view(1)
        owner, number = first_of(key, self.mesh)
        if number == NONE:  # all within the slack; only the rounded figures were not
            return
        text = ""
        if owner == dist.get_rank():
            text = self._explain(
                number, float(scale[caught.index(number)]), stray, usual, step, line
            )
        tell(text, self.mesh, device)

    def _scales(self, caught: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The scale of each gradient to the sum of its parts, and which are no multiple of it."""
        empty = torch.zeros(COLUMNS + 1, dtype=torch.float64, device=device)
        # A row for every parameter, with or without a gradient here: ranks may differ.
        parts = torch.stack([self._parts.get(n, empty) for n in range(len(self.parameters))])
        for role in ROLES:
            parts = self._summed(parts, role)
        index = torch.tensor(caught, dtype=torch.int64, device=device)
        parts = parts.index_select(0, index)
        now = [sketch(grad) for n in caught if (grad := self.parameters[n][1].grad) is not None]
        have = torch.stack(now) if now else parts
        want, norm = parts[:, :COLUMNS], parts[:, COLUMNS].sqrt() * COLUMNS**0.5
        have = have[:, :COLUMNS]
        scale = (have * want).sum(1) / want.square().sum(1)
        clear = want.norm(dim=1) > _NO_PART * norm
        stray = (have - scale.unsqueeze(1) * want).norm(dim=1) > _SLACK * scale.abs() * norm
        # One unknown row is added, because this rank may have no gradient at all.
        return fn.pad(torch.where(clear, scale, torch.nan), [0, 1], value=torch.nan), fn.pad(
            stray & clear, [0, 1]
        )

    def _summed(self, parts: Tensor, role: Role) -> Tensor:
        """The parts, with those of parameters that are R on an axis summed over its ranks."""
        axis = self.mesh[role]
        rows = [i for i, (_, _, p) in enumerate(self.parameters) if role in p and p[role] is R]
        if axis.size == 1 or not rows:
            return parts
        index = torch.tensor(rows, device=parts.device)
        whole = redistribute(parts.index_select(0, index), axis, src=P, dst=R)
        return parts.index_copy(0, index, whole)

    def _explain(
        self, number: int, scale: float, stray: bool, usual: float, step: int, line: str
    ) -> str:
        name, parameter, placement = self.parameters[number]
        axes = [self.mesh[role] for role in ROLES if self.mesh[role].size > 1 and role in placement]
        over = ", ".join(str(axis) for axis in axes if placement[axis.role] is R) or "no axis"
        parts = f"the sum of the ranks' parts over {over}"
        if stray:
            found = f"no multiple of {parts}"
        else:
            found = f"{scale:.3g} times {parts}; usual in this step is {usual:.3g} times"
        return explain(
            f"'{name}'",
            f"gradient {describe(parameter)} is, in step {step}, {found}",
            why="a gradient is summed once over the axes on which its parameter is R, and over no "
            "other; a scale must be the same for all parameters, and at most 1",
            fixes=[
                "reduce each gradient once per step, after the last backward pass",
                "optimizer.zero_grad()   # if it held an earlier value",
                "sanitizer.reduced()   # after the reduction, if the gradients are changed later",
            ],
            at=line,
        )


def _seen(
    name: str, grad: Tensor | None, parameter: Tensor, placement: Placement, line: str
) -> Seen:
    if grad is None:
        form, found = "(none)", parameter.new_zeros((), dtype=torch.int64)
    else:
        local = getattr(grad, "to_local", lambda: grad)()
        form, found = describe(local), fingerprint(local)
    return Seen("gradient", f"'{name}'", "gradient", form, placement, line, found)


def _fair(low: int, high: int) -> bool:
    """True if all scales are equal within the slack, and none is above 1."""
    return high <= _PPM * (1 + _SLACK) and high - low <= 2 * _SLACK * high


def _as_ints(scales: Tensor) -> Tensor:
    """Scales in millionths; 0 where unknown."""
    return (scales.nan_to_num(0.0, 0.0, 0.0).clamp(-1e6, 1e6) * _PPM).round().to(torch.int64)
