"""From transformers' names in memory to its names on disk, as transformers itself converts them.

transformers fuses, splits, transposes and renames between memory and disk, by tables of its own.
They are not read here: small tensors of numbers, each number in one place only, go through
transformers' function that a save goes through, and where the numbers come out is the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from spmd_moe.hf.element_map import WHICH, FileTensor

_EXPERTS = 3  # of a probe; a key for each is a pattern for all
_SIZES, _OF_EXPERTS = (12, 20, 28, 44, 52), (_EXPERTS, 4, 10)  # dims of a probe
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class NoConversionError(Exception):
    """A tensor of which transformers' conversion makes something else than parts of it."""


@final
@dataclass(frozen=True, slots=True)
class _Probe:
    """The numbers that stand for the elements of one tensor in memory."""

    tensor: FileTensor
    first: int
    sizes: tuple[int, ...]  # WHICH, then the dims of the parameter

    def numbers(self) -> Tensor:
        """The tensor as transformers has it in memory."""
        count = _product(self.sizes)
        ours = torch.arange(self.first, self.first + count, device="cpu").view(self.sizes)
        fine = [dim + 1 for dim in self.tensor.fine]  # WHICH is dim 0
        left = [dim for dim in range(ours.ndim) if dim not in fine]
        theirs = ours.permute([*left, *fine]).flatten(0, len(left)) if left else ours.permute(fine)
        shape = [_product([self.sizes[d + 1] for d in group]) for group in self.tensor.dims]
        return theirs.reshape(shape).contiguous()

    def has(self, number: int) -> bool:
        return self.first <= number < self.first + _product(self.sizes)

    def places(self, numbers: Tensor) -> list[Tensor]:
        """For each of our dims, the index of each number."""
        rest, found = numbers - self.first, []
        for size in reversed(self.sizes):
            found.append(rest % size)
            rest = rest // size
        return found[::-1]


def disk_tensors(
    model: Any, memory: Sequence[FileTensor], ndims: Mapping[str, int], experts: Mapping[str, int]
) -> list[FileTensor]:
    """What a checkpoint has, for a model that has `memory`.

    Args:
        model: The model of transformers, before its blocks are replaced.
        memory: Its tensors in memory, by transformers' names.
        ndims: Number of dims of each of our parameters.
        experts: Number of experts, of parameters whose dim 0 is experts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    probes, first = [], 0
    for tensor in memory:
        name = tensor.names[0]
        sizes = (len(tensor.names), *(_OF_EXPERTS if name in experts else _SIZES)[: ndims[name]])
        probes.append(_Probe(tensor, first, sizes))
        first += _product(sizes)
    try:
        state = {probe.tensor.key: probe.numbers() for probe in probes}
        converted = revert_weight_conversion(model, state)
    except Exception as error:
        raise NoConversionError(f"transformers' conversion fails: {error}") from error
    unchanged = {id(state[probe.tensor.key]): probe.tensor for probe in probes}
    found = [
        replace(unchanged[id(numbers)], key=key)
        if id(numbers) in unchanged
        else _read(key, numbers, probes)
        for key, numbers in converted.items()
    ]
    return [each for tensor in _groups(found) for each in _all_experts(tensor, experts)]


def _read(key: str, numbers: Tensor, probes: Sequence[_Probe]) -> FileTensor:
    """Which elements of which of our parameters a tensor on disk has."""
    flat = numbers.flatten()
    low, high = 0, len(probes) - 1
    while low < high:  # the last probe that begins at or before the number
        middle = (low + high + 1) // 2
        low, high = (middle, high) if probes[middle].first <= int(flat[0]) else (low, middle - 1)
    probe = probes[low]
    if numbers.dtype is not torch.int64 or not all(
        map(probe.has, (int(flat.min()), int(flat.max())))
    ):
        raise NoConversionError(f"{key!r} is not parts of one tensor of the model")
    places = probe.places(numbers)
    dims = tuple(_along(places, axis) for axis in range(numbers.ndim))
    varying = {dim for group in dims for dim in group}
    constant = {d - 1: int(p.flatten()[0]) for d, p in enumerate(places) if d - 1 not in varying}
    which = constant.pop(WHICH, None)
    fixed = tuple((d, i) for d, i in constant.items() if probe.sizes[d + 1] > 1)
    names = probe.tensor.names if which is None else (probe.tensor.names[which],)
    tensor = FileTensor(key, names, dims, fixed)
    expected = _expected(probe, which, dict(fixed), dims, tuple(numbers.shape))
    if expected is None or not torch.equal(expected, numbers):
        raise NoConversionError(f"{key!r} is not a part of {', '.join(probe.tensor.names)}")
    return tensor


def _along(places: Sequence[Tensor], axis: int) -> tuple[int, ...]:
    """Our dims that change along an axis of a tensor, the one that changes last first."""
    steps: list[tuple[int, int]] = []
    for dim, place in enumerate(places):
        line = place.movedim(axis, 0).flatten(1)[:, 0] if place.ndim > 1 else place
        changed = (line != line[0]).nonzero()
        if len(changed):
            steps.append((-int(changed[0]), dim - 1))
    return tuple(dim for _, dim in sorted(steps))


def _expected(
    probe: _Probe,
    which: int | None,
    fixed: Mapping[int, int],
    dims: tuple[tuple[int, ...], ...],
    shape: tuple[int, ...],
) -> Tensor | None:
    """What the tensor would be, if it is what was read from it."""
    end = probe.first + _product(probe.sizes)
    ours = torch.arange(probe.first, end, device="cpu").view(probe.sizes)
    ours = ours if which is None else ours[which : which + 1]
    for dim, index in fixed.items():
        ours = ours.narrow(dim + 1, index, 1)
    fine = [dim + 1 for group in dims for dim in group]
    left = [dim for dim in range(ours.ndim) if dim not in fine]
    if len(set(fine)) != len(fine) or any(ours.shape[dim] > 1 for dim in left):
        return None
    moved = ours.permute([*left, *fine])
    return moved.reshape(shape) if moved.numel() == _product(shape) else None


def _groups(found: Sequence[FileTensor]) -> list[FileTensor]:
    """Keys that differ in the number of the expert alone, as one, with `{}` in its place."""
    single = [tensor for tensor in found if not tensor.fixed]
    of_expert: dict[tuple[object, ...], list[FileTensor]] = {}
    for tensor in found:
        if tensor.fixed:
            of_expert.setdefault((tensor.names, tensor.dims), []).append(tensor)
    for tensors in of_expert.values():
        in_order = sorted(tensors, key=lambda tensor: tensor.fixed)
        key = _pattern([tensor.key for tensor in in_order])
        if key is None or [t.fixed for t in in_order] != [((0, e),) for e in range(_EXPERTS)]:
            raise NoConversionError(f"{tensors[0].key!r} is not one expert of a parameter")
        single.append(FileTensor(key, in_order[0].names, in_order[0].dims, ((0, -1),)))
    return single


def _pattern(keys: Sequence[str]) -> str | None:
    """The key with `{}` where `keys` count from 0."""
    for match in _NUMBER.finditer(keys[0]):
        key = f"{keys[0][: match.start()]}{{}}{keys[0][match.end() :]}"
        if [key.format(e) for e in range(len(keys))] == list(keys):
            return key
    return None


def _all_experts(tensor: FileTensor, experts: Mapping[str, int]) -> list[FileTensor]:
    if not tensor.fixed:
        return [tensor]
    return [
        FileTensor(tensor.key.format(e), tensor.names, tensor.dims, ((0, e),))
        for e in range(experts[tensor.names[0]])
    ]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
