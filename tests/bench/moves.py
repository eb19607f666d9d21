"""Time and bytes of every move, beside the functional collective alone and beside spmd_types.

python tests/bench/moves.py                  # 2 gloo processes, 4096 rows of 256 floats
python tests/bench/moves.py --ranks 4 --rows 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import spmd_types
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from spmd_types import Shard
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from spmd_moe import TP, I, MoEMesh, P, R, S, ShardShape, redistribute
from spmd_moe.core.moves import MOVES, all_gather, all_reduce, all_to_all, reduce_scatter
from spmd_moe.core.placement import Kind
from tests.support.workers import POOL, run

KINDS: dict[str, Kind] = {"R": R, "I": I, "P": P, "S": S(0)}
WIDTH = 256


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each, taken in turn, so that what disturbs one disturbs all."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def bare(kernel: object, rows: int, shape: ShardShape, group: dist.ProcessGroup) -> Any:
    """The collective of a move on a tensor that needs no care; None where nothing is sent."""
    padded, ranks = shape.padded, shape.ranks
    whole, share = torch.ones(rows, WIDTH), torch.ones(padded, WIDTH)
    spread, flat = torch.ones(padded * ranks, WIDTH), torch.ones(ranks, padded * WIDTH // ranks)
    calls: dict[object, Callable[[], Tensor]] = {
        all_reduce: lambda: funcol.all_reduce(whole, "sum", group),
        all_gather: lambda: funcol.all_gather_tensor(share, 0, group),
        reduce_scatter: lambda: funcol.reduce_scatter_tensor(spread, "sum", 0, group),
        all_to_all: lambda: funcol.all_to_all_single(flat, None, None, group),
    }
    return calls.get(kernel)


def waited(function: Callable[[], Tensor]) -> None:
    result = function()
    if isinstance(result, funcol.AsyncCollectiveTensor):
        result.wait()


def rank_main(rows: int, repeats: int) -> list[tuple[str, str, int, float, float | None]]:
    """Name, kinds, bytes sent, seconds, and seconds of the collective alone, of each move."""
    warnings.simplefilter("ignore")  # old names of funcol, which torch 2.12 renamed
    axis, found = MoEMesh.init("cpu", tp=dist.get_world_size())[TP], []
    shape = ShardShape.even(rows, axis.size)
    for (src, dst), row in MOVES.items():
        sharded = src == "S"
        x = torch.ones(shape.sizes[axis.rank] if sharded else rows, WIDTH)
        to: Kind = S(1) if src == dst == "S" else KINDS[dst]
        given = shape if "S" in (src, dst) else None

        ours = partial(redistribute, x, axis, src=KINDS[src], dst=to, shape=given)
        functions: dict[str, Callable[[], Any]] = {"ours": partial(waited, ours)}
        if alone := bare(row.run, rows, shape, axis.group):
            functions["alone"] = partial(waited, alone)
        taken = seconds(functions, repeats)
        whole = (shape.padded_total if isinstance(to, Shard) or sharded else rows) * WIDTH * 4
        sent = {"nothing": 0, "(n-1)/n of the whole": 1.0, "2(n-1)/n of the whole": 2.0}
        share = sent.get(row.costs, 1 / axis.size) * (axis.size - 1) / axis.size
        found.append(
            (row.name, f"{src} -> {to!r}", int(whole * share), taken["ours"], taken.get("alone"))
        )
    return found


def world_of_one(repeats: int = 2000) -> list[tuple[str, float, float]]:
    """Every move where there is nothing to move: what a call costs, ours and that of spmd_types."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        axis, found = MoEMesh.init("cpu", tp=1)[TP], []
        theirs = cast(Callable[..., Tensor], spmd_types.redistribute)
        x = torch.ones(8, 8)
        for src, dst in MOVES:
            to: Kind = S(1) if src == dst else KINDS[dst]
            both = seconds(
                {
                    "ours": partial(redistribute, x, axis, src=KINDS[src], dst=to),
                    "theirs": partial(theirs, x, axis.group, src=KINDS[src], dst=to),
                },
                repeats,
            )
            found.append((f"{src} -> {to!r}", both["ours"], both["theirs"]))
        return found
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes (2)")
    parser.add_argument("--rows", type=int, default=4096, help=f"rows of {WIDTH} floats (4096)")
    parser.add_argument("--repeats", type=int, default=50, help="calls of each, median shown (50)")
    args = parser.parse_args()
    if min(args.ranks, args.repeats) < 1 or args.rows < 0:
        parser.error("--ranks and --repeats are at least 1, --rows is at least 0")
    print(f"{args.rows} rows of {WIDTH} floats, {args.ranks} gloo ranks, rank 0, milliseconds")
    print(
        f"{'move':<16}{'kinds':<14}{'bytes sent':>12}{'redistribute':>14}{'alone':>9}{'ratio':>8}"
    )
    for name, kinds, size, ours, alone in run(args.ranks, rank_main, args.rows, args.repeats)[0]:
        rest = f"{alone * 1e3:9.3f}{ours / alone:8.2f}" if alone else ""
        print(f"{name:<16}{kinds:<14}{size:>12}{ours * 1e3:>14.3f}{rest}")
    POOL.close()
    print("\na call in a world of one, microseconds")
    print(f"{'kinds':<14}{'ours':>8}{'spmd_types':>12}")
    for kinds, one, other in world_of_one():
        print(f"{kinds:<14}{one * 1e6:>8.1f}{other * 1e6:>12.1f}")


if __name__ == "__main__":
    main()
