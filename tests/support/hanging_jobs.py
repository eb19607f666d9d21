"""A short training job of which one rank does something bad in its sixth step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from spmd_moe import (
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    init_weights,
    reduce_gradients,
    watch_hangs,
)

BAD_STEP = 6


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loops() -> NoReturn:
    while True:
        pass


def locks() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def raises() -> NoReturn:
    raise ValueError("the seventh sample is damaged\nand more lines")


def sleeps() -> None:
    time.sleep(4)


def nothing() -> None:
    pass


ACTS: dict[str, Callable[[], object]] = {
    act.__name__: act for act in (stops, loops, locks, raises, sleeps)
}


def layer_of_all_ranks() -> MoE:
    world = dist.get_world_size()
    layer = MoE(MoEConfig(8, 12, RouterConfig(12, 2)), MoEMesh.init("cpu", tp=world, ep=world))
    init_weights(layer, layer.mesh, seed=0)
    return layer


def train(act: str, bad_rank: int, seconds: float, where: str = "forward") -> str:
    """Some steps; `bad_rank` does `act` in the sixth, before `where`."""
    layer, mine = layer_of_all_ranks(), dist.get_rank() == bad_rank

    def at(place: str) -> None:
        if mine and place == where and watch.steps + 1 == BAD_STEP:
            ACTS.get(act, nothing)()

    with watch_hangs(seconds=seconds, first_seconds=30) as watch:
        for _ in range(BAD_STEP if act == "leaves early" and mine else BAD_STEP + 2):
            x = torch.ones(4, 8, requires_grad=True)
            at("forward")
            y = layer(x).hidden
            at("backward")
            y.sum().backward()
            at("reduction")
            reduce_gradients(layer, layer.mesh)
            layer.zero_grad()
            watch.step()
            with watch.pause():
                at("pause")
            dist.barrier()
    return "done"


def with_a_store_in_rank_0(port: int, seconds: float) -> str:
    """As `train`, where rank 0 stops, and the store that connects the ranks with it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return train("stops", 0, seconds)
