"""Targets that do not behave: each does one bad thing, when it is built or in its forward."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

import spmd_types
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmd_moe.check import Case
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DP, TP, Placed, R, V

FORKED: list[int] = []
Act = Callable[[], object]
Rows = Placed[Tensor, DP[V], CP[V], TP[V]]


class Gate(nn.Module):
    weight: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(4, 8)), act

    def forward(self, x: Tensor) -> Tensor:
        self.act()
        return nn.functional.linear(x, self.weight)


class OddError(BaseException):
    """Not an Exception."""


def loops() -> None:
    print("looping in", os.getpid(), flush=True)
    while True:
        pass


def swallows() -> None:
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            continue


def ignores_alarms() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    loops()


def exits() -> None:
    sys.exit(0)


def exits_at_once() -> None:
    os._exit(0)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def segfaults() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def forks() -> None:
    if os.fork() == 0:
        return
    time.sleep(60)


def forks_once() -> None:
    """The copy goes on with the check, as this process does."""
    if not FORKED:
        FORKED.append(os.getpid())
        os.fork()


def is_odd() -> None:
    raise OddError("odd")


def interrupts() -> None:
    raise KeyboardInterrupt


def prints() -> None:
    print("{" * 100_000)
    os.write(1, b"{" * 100_000)  # as code in C does


def closes() -> None:
    sys.stdout.close()


def asks() -> None:
    input("yes or no? ")


def says_odd_things() -> None:
    raise RuntimeError("bell \x07 escape \x1b[2J nul \x00 <b>&amp; ]]> \ufffe \ud83d")


def says_much() -> None:
    raise RuntimeError("x" * 10_000_000)


def nothing() -> None:
    pass


ACTS = (
    *(loops, swallows, ignores_alarms, exits, exits_at_once, is_killed, segfaults, forks, is_odd),
    *(forks_once, interrupts, prints, closes, asks, says_odd_things, says_much),
)


def _case(mesh: MoEMesh, in_forward: Act) -> Case:
    return Case(Gate(in_forward), (torch.ones(mesh[TP].rank + 1, 8),), (Rows,))


def _in_forward(act: Act, mesh: MoEMesh, tokens: int) -> Case:
    return _case(mesh, act)


def _when_built(act: Act, mesh: MoEMesh, tokens: int) -> Case:
    act()
    return _case(mesh, nothing)


for _act in ACTS:
    globals()[f"forward_{_act.__name__}"] = partial(_in_forward, _act)
    globals()[f"build_{_act.__name__}"] = partial(_when_built, _act)


def breaks_the_checker(mesh: MoEMesh, tokens: int) -> Case:

    from spmd_moe.check import check_layout

    vars(check_layout)["compare"] = lambda traces: [][0]
    return _case(mesh, nothing)


# --- targets that are none ------------------------------------------------------------------------


def of_mesh_alone(mesh: MoEMesh) -> Case:
    return _case(mesh, nothing)


def factory(mesh: MoEMesh, tokens: int) -> object:
    return partial(_in_forward, nothing)


def without_the_comma(mesh: MoEMesh, tokens: int) -> Case:
    return Case(Gate(nothing), (torch.ones(3, 8)), (Rows,))  # type: ignore[arg-type]  # the mistake


def of_a_function(mesh: MoEMesh, tokens: int) -> Case:
    return Case(nn.functional.relu, (torch.ones(3, 8),), (Rows,))  # type: ignore[arg-type]  # same


# --- raw collectives, under --values --------------------------------------------------------------


class RawExchange(nn.Module):
    """A right exchange of equal parts by a raw collective, in a line that may use it."""

    weight: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Rows) -> Tensor:
        with spmd_types.no_typecheck():  # spmd: allow no_typecheck - counts have no types
            counts = torch.ones(dist.get_world_size(), dtype=torch.int64)
            got = torch.empty_like(counts)
            dist.all_to_all_single(got, counts)  # spmd: allow raw - counts have no gradient
        return nn.functional.linear(x, self.weight)


def raw_exchange(mesh: MoEMesh, tokens: int) -> Case:
    sizes = [tokens // mesh[TP].size + (r < tokens % mesh[TP].size) for r in range(mesh[TP].size)]
    return Case(RawExchange(), (torch.randn(sizes[mesh[TP].rank], 8),), (Rows,))
