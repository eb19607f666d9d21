"""Which operators run: for tests of what is sent, and of what is never done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operator(NamedTuple):
    name: str
    dtype: torch.dtype | None  # of the first argument, where that is a tensor
    shape: tuple[int, ...] = ()


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
            if args and isinstance(args[0], Tensor):
                ran.append(Operator(func.name(), args[0].dtype, tuple(args[0].shape)))
            else:
                ran.append(Operator(func.name(), None))
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]  # torch does not type its constructor
        yield ran
