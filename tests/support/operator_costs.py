"""What a computation costs, counted: operators that move data, and the bytes they read and write.

Counts do not depend on the machine or its load, so a test can hold them exactly. They do not need
values either: tensors on the meta device give the same.

    operators   ATen operators that are not views and not allocations, as a dispatch mode sees them
    bytes       of each, its tensor arguments read once and its results written once

An expanded dim counts once. An index or an embedding counts its whole source as read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They allocate, or return their argument: no kernel runs.
_FREE = frozenset(
    [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "alias",
        "_unsafe_view",
        "lift_fresh",
        "promote_types",
        "result_type",
    ]
)


@dataclass
class Costs:
    """The operators that moved data, in order, and the bytes of all of them."""

    operators: list[str] = field(default_factory=list)
    read: int = 0
    written: int = 0

    @property
    def mebibytes(self) -> float:
        return (self.read + self.written) / 2**20


@contextmanager
def counted() -> Iterator[Costs]:
    """The costs of what this thread runs in the block, forward and backward."""
    costs = Costs()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: torch._ops.OpOverload,
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
            result = _run(func, args, kwargs or {})
            name = func.name().removeprefix("aten::").partition(".")[0]
            if not func.is_view and name not in _FREE:
                costs.operators.append(name)
                # `out=` is written, not read: it is the result too.
                given = {k: v for k, v in (kwargs or {}).items() if k != "out"}
                costs.read += _bytes((args, given))
                costs.written += _bytes(result)
            return result

    with Watch():  # type: ignore[no-untyped-call]  # torch does not type its constructor
        yield costs


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
        # torch's kernels take float32; its function for meta tensors does not.
        a, b = args[:2]
        ends = args[2] if len(args) > 2 else kwargs["offs"]
        groups = [] if b.dim() == 3 else [ends.shape[0]]
        return a.new_empty(*groups, a.shape[0], b.shape[-1])
    result: object = func(*args, **kwargs)
    return result


def _bytes(values: object) -> int:
    return sum(_size(t) for t in tree_leaves(values) if isinstance(t, Tensor))


def _size(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.size(), x.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * x.element_size()


def kept_bytes(module: nn.Module, x: Tensor, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, without `x`, the parameters and the buffers."""
    given = {_storage(t) for t in (x, *module.parameters(), *module.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in given:
            size = t.untyped_storage().nbytes()
            kept[_storage(t)] = t, size  # alive, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    total = sum(size for _, size in kept.values())
    del result
    return total


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # type: ignore[no-any-return]  # of meta tensors, all data pointers are 0
