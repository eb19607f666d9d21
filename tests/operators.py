"""Which operators run: for tests of what is sent, and of what is never done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def operators() -> Iterator[list[str]]:
    """The names of the operators that this thread runs, forward and backward, as they come."""
    names: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: torch._ops.OpOverload,
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]  # torch does not type its constructor
        yield names
