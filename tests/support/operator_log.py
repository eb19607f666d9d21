"""Which operators run: for tests of what is sent, and of what is never done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operator(NamedTuple):
    name: str
    dtype: torch.dtype | None  # of the first argument, where that is a tensor
    shape: tuple[int, ...] = ()
    waits: torch.dtype | None = None  # of the result of a collective that it is the first to use


@contextmanager
def operators() -> Iterator[list[Operator]]:
    """The operators that this thread runs, forward and backward, as they come."""
    ran: list[Operator] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: torch._ops.OpOverload,
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            results = [x for x in tree_leaves(args) if isinstance(x, AsyncCollectiveTensor)]
            used = [x.dtype for x in results if not (x.completed or func.is_view)]
            dtype, shape = (None, ()) if first is None else (first.dtype, tuple(first.shape))
            ran.append(Operator(func.name(), dtype, shape, used[0] if used else None))
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]  # torch does not type its constructor
        yield ran
