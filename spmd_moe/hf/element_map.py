"""Which elements of a checkpoint's tensor are which elements of a model's parameters: one table.

A `FileTensor` says it for one key. Its dims are written as the dims of the parameter that each is
made of, and serve reading and writing alike:

    experts.3.gate_proj.weight [F, D]      w1_eFD [E, F, D]   dims ((1,), (2,))  fixed ((0, 3),)
    experts.gate_up_proj [E, 2F, D]        w1_eFD, w3_eFD     dims ((0,), (WHICH, 1), (2,))
    experts.gate_up_proj [E, D, 2F]        interleaved        dims ((0,), (2,), (1, WHICH))
    experts.mlp.w1 [E*F, D]                w1_eFD             dims ((0, 1), (2,))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from spmd_moe.hf.safetensors_slices import Range

WHICH = -1  # the dim that says which of several parameters of one shape an element belongs to


@final
@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of a parameter, and where in the whole it begins."""

    tensor: Tensor
    whole: tuple[int, ...]
    at: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a checkpoint; `names` are the parameters that its elements belong to."""

    key: str
    names: tuple[str, ...]
    dims: tuple[tuple[int, ...], ...]
    fixed: tuple[tuple[int, int], ...] = ()  # dims of the parameter of which it has one index

    @property
    def fine(self) -> tuple[int, ...]:
        """Its dims, split so that each is one dim of the parameter, or WHICH."""
        return tuple(dim for group in self.dims for dim in group)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape in the file, for parameters of the shape `whole`."""
        return tuple(math.prod(self._size(dim, whole) for dim in group) for group in self.dims)

    def fine_shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._size(dim, whole) for dim in self.fine)

    def _size(self, dim: int, whole: Sequence[int]) -> int:
        return len(self.names) if dim == WHICH else whole[dim]

    def box(self, part: Part) -> tuple[Range, ...] | None:
        """Where a rank's part lies in the finer shape; None if it has nothing of this tensor."""
        shape = part.tensor.shape
        inside = (part.at[d] <= i < part.at[d] + shape[d] for d, i in self.fixed)
        if 0 in shape or not all(inside):
            return None
        return tuple(
            (0, len(self.names)) if d == WHICH else (part.at[d], shape[d]) for d in self.fine
        )

    def regions(
        self, parts: Sequence[Part], piece: Sequence[Range], data: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A piece of the box as regions of the parameters, each with its place in `data`."""
        fine, fixed = self.fine, dict(self.fixed)
        ranges = dict(zip(fine, piece, strict=True))
        first, count = ranges.pop(WHICH, (0, 1))
        for i in range(first, first + count):
            at, region = parts[i].at, parts[i].tensor
            for dim, (start, size) in ranges.items():
                region = region.narrow(dim, start - at[dim], size)
            kept = [dim for dim in range(region.ndim) if dim not in fixed]
            for dim in sorted(fixed, reverse=True):
                region = region.select(dim, fixed[dim] - at[dim])
            region = region.permute([kept.index(dim) for dim in fine if dim != WHICH])
            yield region, data.select(fine.index(WHICH), i - first) if WHICH in fine else data
