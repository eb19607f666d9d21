"""A process group of one real rank: the other ranks are taken to hold what it holds.

torch's fake process group leaves the results of collectives as they happen to be in memory, so code
that reads sizes from them runs into nonsense. Here a gather returns this rank's own tensor once for
every rank, a sum is that many times the tensor, and an exchange gives what this rank would send to
itself. Every size is then one that could be in any world, and nothing is ever waited for.

    rank 2 of 4    all_gather      x          ->  x x x x
                   reduce_scatter  a b c d    ->  4 c
                   all_to_all      a b c d    ->  c c c c

Made with torch's public registration of backends. One function of torch is replaced for the time:
`new_group` makes no groups of other ranks, which no rank could reach and which cost the more, the
larger the world is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, final
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

NAME = "mirror"


@final
@dataclass(frozen=True, slots=True)
class Issued:
    """One collective that the traced code issued."""

    op: str
    group: tuple[int, ...]  # its ranks
    shape: tuple[int, ...]  # of what this rank gave
    dtype: torch.dtype
    splits: tuple[int, ...] = ()  # rows to each rank, where an exchange has them
    caller: tuple[str, int] | None = None  # file and line that it comes from; None in backward
    raw: bool = False  # no typed function stands between that line and the collective


@contextmanager
def mirror_world(ranks: int, rank: int = 0) -> Iterator[list[Issued]]:
    """Be rank `rank` of a default process group of `ranks`; yields what is issued, in order."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _make, devices=["cpu", "cuda", "meta"])
    hook = sys.excepthook  # torch puts the rank's name before it, and leaves it there
    try:
        dist.init_process_group(NAME, store=dist.HashStore(), rank=rank, world_size=ranks)
        with _own_groups(ranks, rank):
            yield _issued_in_world()
    finally:
        sys.excepthook = hook
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _own_groups(ranks: int, rank: int) -> Iterator[None]:
    """`new_group` that makes those groups only that this rank is in."""
    new_group = dist.new_group

    @functools.wraps(new_group)
    def own(members: Any = None, *args: Any, **kwargs: Any) -> Any:
        members = kwargs.pop("ranks", members)
        if members and rank not in members and 0 <= min(members) <= max(members) < ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(members, *args, **kwargs)

    with ExitStack() as stack:
        for module in (dist, dist.distributed_c10d, dist.device_mesh):
            stack.enter_context(mock.patch.object(module, "new_group", own))
        yield


def _issued_in_world() -> list[Issued]:
    """What all groups of the open world have issued, in order: the default group keeps it."""
    world: Any = dist.group.WORLD
    issued: list[Issued] = world.issued
    return issued


def _make(store: object, rank: int, ranks: int, timeout: object) -> ProcessGroup:
    return _Mirror(rank, ranks)


def _done(result: object) -> Any:
    future: torch.futures.Future[object] = torch.futures.Future()
    future.set_result(result)
    return vars(torch._C._distributed_c10d)["_create_work_from_future"](future)


# torch calls these methods with lists of tensors; it types them for callers, in many overloads.
_Group: Any = ProcessGroup


@final
class _Mirror(_Group):  # type: ignore[misc]  # see above
    """The collectives, with this rank's own tensor in place of everybody's."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank, ranks)
        self.place, self.ranks = rank, ranks
        self.issued: list[Issued] = []

    def getBackendName(self) -> str:  # noqa: N802  # torch's name for it
        return NAME

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.place

    @property
    def group_name(self) -> Any:
        return dist.distributed_c10d._world.pg_names[self]

    @torch.no_grad()
    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        for x in tensors:
            self._log("all_reduce", x)
            if _adds(opts):
                x.mul_(self.ranks)
        return _done(tensors)

    @torch.no_grad()
    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Any:
        self._log("all_gather", x)
        out.view(self.ranks, *x.shape).copy_(x.unsqueeze(0).expand(self.ranks, *x.shape))
        return _done(out)

    @torch.no_grad()
    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Any:
        self._log("reduce_scatter", x)
        out.copy_(x.view(self.ranks, *out.shape)[self.place])
        if _adds(opts):
            out.mul_(self.ranks)
        return _done(out)

    def all_gather_single_coalesced(self, outs: Any, inputs: Any, opts: Any = None) -> Any:
        for out, x in zip(outs, inputs, strict=True):
            self.all_gather_single(out, x)
        return _done(outs)

    def reduce_scatter_single_coalesced(self, outs: Any, inputs: Any, opts: Any = None) -> Any:
        for out, x in zip(outs, inputs, strict=True):
            self.reduce_scatter_single(out, x, opts)
        return _done(outs)

    # The names that torch 2.12 renamed.
    _allgather_base, allgather_into_tensor_coalesced = (
        all_gather_single,
        all_gather_single_coalesced,
    )
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @torch.no_grad()
    def all_to_all_single(
        self, out: Tensor, x: Tensor, receives: list[int], sends: list[int], opts: Any = None
    ) -> Any:
        """What this rank would send to itself comes from every rank, as far as there is room."""
        ranks = self.ranks
        sends = list(sends) or [x.shape[0] // ranks] * ranks
        receives = list(receives) or [out.shape[0] // ranks] * ranks
        self._log("all_to_all", x, tuple(sends))
        own = x.split(sends)[self.place]
        for part in out.split(receives):
            rows = min(part.shape[0], own.shape[0])
            part.zero_()
            part[:rows].copy_(own[:rows])
        return _done(out)

    alltoall_base = all_to_all_single

    @torch.no_grad()
    def alltoall(self, outs: Any, inputs: Any, opts: Any = None) -> Any:
        """Of lists of tensors, one for each rank."""
        self._log("all_to_all", torch.cat([x.reshape(-1) for x in inputs]))
        for out in outs:
            self._repeat(out, inputs[self.place])
        return _done(outs)

    @torch.no_grad()
    def reduce_scatter(self, outs: Any, inputs: Any, opts: Any = None) -> Any:
        """Of lists of tensors, one for each rank."""
        for out, parts in zip(outs, inputs, strict=True):
            self._log("reduce_scatter", torch.cat([x.reshape(-1) for x in parts]))
            out.copy_(parts[self.place])
            if _adds(opts):
                out.mul_(self.ranks)
        return _done(outs)

    @torch.no_grad()
    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        for x in tensors:
            self._log("reduce", x)
            if _adds(opts) and opts.rootRank == self.place:
                x.mul_(self.ranks)
        return _done(tensors)

    @torch.no_grad()
    def gather(self, outs: Any, inputs: Any, opts: Any = None) -> Any:
        self._log("gather", inputs[0])
        for part in outs[0] if outs else ():  # on the rank that receives
            self._repeat(part, inputs[0])
        return _done(outs)

    @torch.no_grad()
    def scatter(self, outs: Any, inputs: Any, opts: Any = None) -> Any:
        self._log("scatter", outs[0])
        if inputs:  # on the rank that sends; others keep what they have
            self._repeat(outs[0], inputs[0][self.place])
        return _done(outs)

    @staticmethod
    def _repeat(out: Tensor, x: Tensor) -> None:
        out.copy_(x) if out.shape == x.shape else out.zero_()

    @torch.no_grad()
    def allgather(self, outs: Any, inputs: Any, opts: Any = None) -> Any:
        for parts, x in zip(outs, inputs, strict=True):
            self._log("all_gather", x)
            for part in parts:
                self._repeat(part, x)
        return _done(outs)

    @torch.no_grad()
    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        for x in tensors:
            self._log("broadcast", x)
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        return _done(None)

    def _log(self, op: str, x: Tensor, splits: Sequence[int] = ()) -> None:
        ranks = tuple(dist.get_process_group_ranks(self))
        caller, raw = _caller()
        one = Issued(op, ranks, tuple(x.shape), x.dtype, tuple(splits), caller, raw)
        _issued_in_world().append(one)


# Code that knows what types its collectives have, and code that is never the one at fault.
_TYPED = (
    "spmd_types",
    "spmd_moe.core.collectives",
    "spmd_moe.core.moves",
    "spmd_moe.core.host_values",
    "torch.distributed.tensor",
)
_BETWEEN = (
    "torch.",
    "contextlib",
    "spmd_moe.core.autograd_function",
    "spmd_moe.core.redistribute",
    "spmd_moe.check.",
)


def _caller() -> tuple[tuple[str, int] | None, bool]:
    """The line of the program it comes from, and whether nothing that is typed lies between."""
    frame: FrameType | None = sys._getframe(2)
    raw = True
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_TYPED):
            raw = False
        elif name == "spmd_moe.check.trace":  # its own call of backward
            return None, False
        elif not f"{name}.".startswith(_BETWEEN):
            return (frame.f_code.co_filename, frame.f_lineno), raw
        frame = frame.f_back
    return None, raw


def _adds(opts: Any) -> bool:
    return opts is None or opts.reduceOp == dist.ReduceOp.SUM
