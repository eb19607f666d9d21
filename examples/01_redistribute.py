"""Redistribute at work, drawn: five rows over four ranks, there and back.

    torchrun --nproc-per-node 4 examples/01_redistribute.py

Each column is what one rank holds. A letter is a row, +a is a part of a sum that is row a, and a
dot is padding, which exists only while a collective runs. Started without torchrun, it runs on one
rank alone.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from spmd_types import Shard
from torch import Tensor

from spmd_moe import TP, Axis, I, MoEMesh, P, R, S, ShardShape, redistribute
from spmd_moe.core.placement import Kind

NAMES = "abcdefghijklmnopqrstuvwxyz"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5, help="rows of the whole, 0 to 26 (5)")
    rows = parser.parse_args().rows
    if not 0 <= rows <= len(NAMES):
        parser.error(f"--rows is {rows}, but rows are named by letters: 0 to {len(NAMES)}")

    tp = join()[TP]
    shape = ShardShape.even(rows, tp.size)
    whole = torch.arange(1.0, rows + 1)  # row a is 1, row b is 2
    own = whole.narrow(0, shape.offsets[tp.rank], shape.sizes[tp.rank])
    say(tp, f"{shape} on {tp}; a collective moves {shape.padded} per rank, the rest is padding")
    draw(tp, whole, R, S(0), shape, "each rank keeps its rows, nothing is sent")
    draw(tp, own, S(0), R, shape, "pad, gather, trim")
    draw(tp, whole / tp.size, P, S(0), shape, "pad, add up while scattering, trim")
    draw(tp, whole, I, S(0), shape, "as from R, but backward gathers: the gradient is I again")
    if dist.is_initialized():
        dist.destroy_process_group()


def join() -> MoEMesh:
    """All ranks that torchrun started, on the tp axis; or this process alone."""
    if "WORLD_SIZE" not in os.environ:
        print("One rank alone. For four: torchrun --nproc-per-node 4 examples/01_redistribute.py\n")
        return MoEMesh.single()
    dist.init_process_group("gloo")
    return MoEMesh.init("cpu", tp=dist.get_world_size())


def draw(tp: Axis, x: Tensor, src: Kind, dst: Kind, shape: ShardShape, what: str) -> None:
    """Move a tensor, send a gradient back, and draw what each rank has of all three."""
    x = x.clone().requires_grad_()
    y = redistribute(x, tp, src=src, dst=dst, shape=shape)
    y.backward(torch.full_like(y, 1.0 + tp.rank))
    assert x.grad is not None
    pictures = {
        "before": rows_of(x.detach(), src, shape, tp),
        "after": rows_of(y.detach(), dst, shape, tp),
        "gradient of after": [str(1 + tp.rank)] * y.shape[0],
        "gradient of before": [f"{value:g}" for value in x.grad.tolist()],
    }
    say(tp, f"\n{src!r} -> {dst!r}   {what}")
    columns = {name: gathered(tp, " ".join(cells)) for name, cells in pictures.items()}
    width = max(8, *(len(cell) + 3 for column in columns.values() for cell in column))
    say(tp, " " * 22 + "".join(f"rank {r}".ljust(width) for r in range(tp.size)).rstrip())
    for name, column in columns.items():
        say(tp, f"  {name:<20}" + "".join(cell.ljust(width) for cell in column).rstrip())


def rows_of(x: Tensor, kind: Kind, shape: ShardShape, tp: Axis) -> list[str]:
    """The names of the rows that are here, by their values; for a shard also its padding."""
    if kind is P:
        return ["+" + NAMES[round(value * tp.size) - 1] for value in x.tolist()]
    names = [NAMES[round(value) - 1] for value in x.tolist()]
    padding = shape.padded - len(names) if isinstance(kind, Shard) else 0
    return names + ["."] * padding


def gathered(tp: Axis, text: str) -> list[str]:
    """What every rank has to say, on every rank: by redistribute itself."""
    letters = torch.tensor([list(text.encode().ljust(128)[:128])])
    # spmd: allow move - torch.tensor is taken for R, but every rank has its own text
    rows = redistribute(letters, tp, src=S(0), dst=R)
    return [bytes(row).decode().strip() for row in rows.tolist()]


def say(tp: Axis, line: str) -> None:
    if tp.rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
