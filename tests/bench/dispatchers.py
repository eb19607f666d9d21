"""Time of `DedupAllToAll` and `AllToAll` over gloo: dispatch, collect and combine, no experts.

python -m tests.bench.dispatchers                  # EP 2 and 4, 1,024 tokens a rank
python -m tests.bench.dispatchers --ranks 2 --dim 2048

The two are called in turn, so that what disturbs one disturbs both, and the ratio of each turn is
taken. A ratio is shown with its quartiles.
"""

# Shape letters in this file:
#   T  tokens of a rank    K  experts per token    D  model width    E  experts

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from spmd_moe import AllToAll, DedupAllToAll, Dispatcher, MoEMesh
from spmd_moe.layer.router import Routing, count_choices
from tests.support.workers import POOL, run

E, K = 128, 8


def made(dispatcher: Dispatcher[Any], tokens: int, dim: int) -> Callable[[bool], float]:
    """A call that measures seconds of a forward, or of a forward and backward."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    ids_TK = torch.rand((tokens, E), generator=draw).topk(K, 1).indices
    none, weights_TK = torch.zeros((), dtype=torch.int64), torch.full((tokens, K), 1 / K)
    counts_E = count_choices(ids_TK, E)
    routing = Routing(
        ids_TK, weights_TK, weights_TK, weights_TK, counts_E, none, none, complete=True
    )
    x_TD = torch.randn((tokens, dim), generator=draw)
    weights_TK, x_TD = weights_TK.requires_grad_(), x_TD.requires_grad_()

    def call(backward: bool) -> float:
        dist.barrier()
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            arrived, state = dispatcher.dispatch(x_TD, weights_TK, routing)
            y_TD = dispatcher.combine(dispatcher.collect(arrived.rows_RD, state), state)
            if backward:
                torch.autograd.grad(y_TD, x_TD, torch.ones_like(y_TD))
            else:
                y_TD.sum()
        return time.perf_counter() - begin

    return call


def on_rank(tokens: int, dim: int, repeats: int) -> dict[bool, list[tuple[float, float]]]:
    """Seconds of both in each turn: forward, and forward with backward."""
    torch.set_num_threads(1)
    mesh = MoEMesh.init("cpu", dp=dist.get_world_size(), ep=dist.get_world_size())
    plain, dedup = (made(kind(mesh, E), tokens, dim) for kind in (AllToAll, DedupAllToAll))
    found = {}
    for backward in (False, True):
        turns = [(plain(backward), dedup(backward)) for _ in range(repeats + 3)]
        found[backward] = turns[3:]  # the first ones warm up
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="gloo processes (2 4)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a rank (1024)")
    parser.add_argument("--dim", type=int, default=512, help="width of a token (512)")
    parser.add_argument("--repeats", type=int, default=40, help="turns (40)")
    args = parser.parse_args()
    print("| ranks | | `AllToAll`, ms | `DedupAllToAll`, ms | ratio | quartiles |")
    print("| --- | --- | --- | --- | --- | --- |")
    for ranks in args.ranks:
        sizes = args.tokens, args.dim, args.repeats
        for backward, turns in run(ranks, on_rank, *sizes, timeout=600)[0].items():
            plain, dedup = (statistics.median(times) * 1e3 for times in zip(*turns, strict=True))
            low, middle, high = statistics.quantiles([b / a for a, b in turns], n=4)
            name = "training" if backward else "forward"
            times = f"{plain:.1f} | {dedup:.1f} | {middle:.2f} | {low:.2f} to {high:.2f}"
            print(f"| {ranks} | {name} | {times} |")
    POOL.close()


if __name__ == "__main__":
    main()
