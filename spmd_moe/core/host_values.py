"""What the host reads and says: numbers and bytes, nothing that could have a placement.

A checker that follows tensors ends here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _disable_current_modes

from spmd_moe.core.spmd_types_compat import register_no_typecheck

# The reads of the forward that is running under `recording` or `replaying`, if there is one.
# Not an argument: torch calls the second forward, with the arguments of the first.
_reads: ContextVar[Reads | None] = ContextVar("reads", default=None)


@register_no_typecheck
def read_ints(x: Tensor) -> list[int]:
    """The integers of a 1-d tensor on the host, where the sizes of an exchange are needed.

    What is read differs between ranks, and no checker could follow it: it comes back as the rows
    per rank that `exchange` and `ShardShape` are given.
    """
    reads = None if torch.compiler.is_compiling() else _reads.get()
    if reads is not None and reads.replays:
        return list(next(reads.found))
    numbers = [_plain(n) for n in x.tolist()]
    if reads is not None:
        reads.recorded.append(numbers)
    return numbers


@final
class Reads:
    """What a forward read, so that the same forward in backward does not wait for it again."""

    def __init__(self) -> None:
        self.recorded: list[list[int]] = []
        self.found: Iterator[list[int]] = iter(())
        self.replays = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In this block every read is recorded."""
        self.recorded, self.replays = [], False
        with self._current():
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """In this block every read returns what was recorded, in the same order."""
        self.found, self.replays = iter(self.recorded), True
        with self._current():
            yield

    @contextmanager
    def _current(self) -> Iterator[None]:
        before = _reads.set(self)
        try:
            yield
        finally:
            _reads.reset(before)


@final
class LateRead:
    """A number on a CUDA device that the host reads without waiting, once its copy is complete."""

    @register_no_typecheck
    def __init__(self, x: Tensor) -> None:
        self._copy = torch.empty((), dtype=x.dtype, device="cpu", pin_memory=True)
        self._copy.copy_(x.detach(), non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def ready(self) -> bool:
        return bool(self._copied.query())

    def value(self) -> int:
        with _disable_current_modes():  # a mode must not record this read
            return int(self._copy)


def is_replaying() -> bool:
    """Whether backward is recomputing a forward."""
    reads = _reads.get()
    return reads is not None and reads.replays


def _plain(n: Any) -> int:
    """An int also where one process simulates many ranks, as long as it is the same on all."""
    same = n.node.maybe_as_int() if isinstance(n, torch.SymInt) else n
    return cast(int, n if same is None else same)


@register_no_typecheck
def draw_seed() -> int:
    """From torch's default generator, of which every rank has its own."""
    return int(torch.randint(2**62, (), device="cpu"))


@register_no_typecheck
def all_gather_bytes(
    mine: bytes, groups: Sequence[ProcessGroup | None], device: str
) -> list[bytes]:
    """What every rank says, equally many bytes each, in the order of the ranks.

    It is gathered along one group after another, so the groups of a mesh reach all of its ranks.
    """
    rows = torch.tensor([list(mine)], dtype=torch.uint8, device=device)
    if type(rows) is not torch.Tensor:
        return [mine]  # in FakeTensorMode there are no values to exchange
    for group in groups:
        size = dist.get_world_size(group)
        if size > 1:
            parts = [torch.empty_like(rows) for _ in range(size)]
            dist.all_gather(parts, rows, group=group)
            rows = torch.cat(parts)
    return [bytes(row) for row in rows.tolist()]
