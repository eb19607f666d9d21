"""What a dispatcher sends as the expert-parallel group grows, by its own forecast: nothing runs.

python -m tests.bench.growth                        # one layer of DeepSeek-V3, 2 to 65,536 ranks
python -m tests.bench.growth --tokens 32 --write    # others, and into docs/benchmarks.md

Each rank has its own tokens (dp). The group that exchanges tokens (ep) grows with the world until
each of its ranks has one expert; a larger world has more such groups, and a rank sends no more.

Choices fall on experts evenly. A message is what one rank sends to one other in a collective. Bytes
are those that leave a rank: what it keeps for itself is not counted.
"""

# Shape letters in this file:
#   i, s  ranks of ep that send and receive    j  ranks of etp    E  experts    T  tokens of a rank

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from spmd_moe import EP, AllGather, AllToAll, DedupAllToAll, Dispatcher, MoEMesh
from spmd_moe.layer.dispatch.forecast import Batch, Collective
from tests.support.docs_blocks import DOCS, filled, program
from tests.support.simulated_ranks import fake_world

E, K, DIM = 256, 8, 7168
WORLDS = [2**n for n in range(1, 17)]
DISPATCHERS: dict[str, Callable[[MoEMesh, int], Dispatcher[Any]]] = {
    "AllToAll": AllToAll,
    "AllGather": AllGather,
    "DedupAllToAll": DedupAllToAll,
}


@dataclass(frozen=True)
class Cost:
    """What leaves one rank in a forward and a backward."""

    bytes: int
    messages: int


def leaving(collective: Collective, ranks: int) -> Cost:
    """Of what a rank gives, an exchange and a reduction keep its own part."""
    others = ranks - 1
    if collective.op == "all_gather":
        return Cost(collective.bytes * others, others)
    assert collective.op in ("all_to_all", "reduce_scatter"), collective.op
    return Cost(collective.bytes * others // ranks, others)


def cost(dispatcher: Dispatcher[Any], batch: Batch, ranks: int) -> Cost:
    forecast = dispatcher.forecast(batch)
    assert forecast is not None
    each = [leaving(collective, ranks) for collective in forecast if ranks > 1]
    return Cost(sum(c.bytes for c in each), sum(c.messages for c in each))


def even_batch(ranks: int, tokens: int) -> Batch:
    """Tokens whose choices are spread evenly; how many reach a rank is the expectation."""
    per_rank, missed = E // ranks, 1.0
    for chosen in range(K):
        missed *= max(E - per_rank - chosen, 0) / (E - chosen)
    reached = [round(tokens * (1 - missed))] * ranks
    counts_E = [tokens * K // E] * E
    return Batch(
        tokens_ij=[[tokens]] * ranks,
        counts_ijE=[[counts_E]] * ranks,
        reached_ijs=[[reached]] * ranks,
        dim=DIM,
        top_k=K,
        dtype=torch.bfloat16,
        weight_dtype=torch.float32,
        early=True,
    )


def costs(world: int, tokens: int) -> dict[str, Cost]:
    with fake_world(world):
        mesh = MoEMesh.init("cpu", dp=world, ep=min(world, E))
        ranks = mesh[EP].size
        batch = even_batch(ranks, tokens)
        return {name: cost(make(mesh, E), batch, ranks) for name, make in DISPATCHERS.items()}


def table(found: dict[int, dict[str, Cost]]) -> Iterator[str]:
    names = [f"{name}, {what}" for name in DISPATCHERS for what in ("MiB", "messages")]
    yield f"| ranks | ep | {' | '.join(names)} |"
    yield "| --- " * (len(names) + 2) + "|"
    for world, each in found.items():
        cells = [f"{c.bytes / 2**20:,.1f} | {c.messages:,}" for c in each.values()]
        same = [f"{w:,}" for w, other in found.items() if other == each]
        if same[0] == f"{world:,}":
            ranks = " to ".join(dict.fromkeys((same[0], same[-1])))
            yield f"| {ranks} | {min(world, E)} | {' | '.join(cells)} |"


def drawing(found: dict[int, dict[str, Cost]]) -> str:
    """MiB that leave a rank, over the number of ranks; both axes are logarithmic."""
    draw = program(DOCS / "draw.py")
    text, colors = draw.text, draw.COLORS
    width, height, left, top = 640, 340, 70, 40
    mib = {w: {n: c.bytes / 2**20 for n, c in each.items()} for w, each in found.items()}
    powers = [math.log10(value) for each in mib.values() for value in each.values()]
    low, high = math.floor(min(powers)), math.ceil(max(powers))

    def x(world: int) -> float:
        return left + (width - left - 130) * (math.log2(world) - 1) / 15

    def y(value: float) -> float:
        return height - 50 - (height - 50 - top) * (math.log10(value) - low) / (high - low)

    parts = [
        text(left, 22, "MiB that leave a rank in one layer, forward and backward", "#333", "start")
    ]
    for power in range(low, high + 1):
        parts.append(_line([(left, y(10**power)), (x(WORLDS[-1]), y(10**power))], "#ddd", 1))
        parts.append(text(left - 8, y(10**power) + 4, f"{10**power:,g}", anchor="end"))
    for world in WORLDS[::3]:
        parts.append(text(x(world), height - 28, f"{world:,}"))
    parts.append(text((left + x(WORLDS[-1])) / 2, height - 8, "ranks"))
    for name, color in zip(DISPATCHERS, colors, strict=False):
        parts.append(_line([(x(w), y(each[name])) for w, each in mib.items()], color, 2))
        parts.append(text(x(WORLDS[-1]) + 8, y(mib[WORLDS[-1]][name]) + 4, name, color, "start"))
    drawn: str = draw.picture(width, height, parts)
    return drawn


def _line(points: Iterable[tuple[float, float]], color: str, width: int) -> str:
    along = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    return f'<polyline points="{along}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank; a multiple of 32")
    parser.add_argument("--write", action="store_true", help="put table and drawing in the docs")
    args = parser.parse_args()
    if args.tokens < 1 or args.tokens * K % E:
        parser.error(f"--tokens {args.tokens}: choices are spread evenly over {E} experts")
    found = {world: costs(world, args.tokens) for world in WORLDS}
    lines = list(table(found))
    print("\n".join(lines))
    if args.write:
        page = DOCS / "benchmarks.md"
        page.write_text(filled(page.read_text(), "growth", "\n".join(lines)))
        (DOCS / "_static" / "growth.svg").write_text(drawing(found))


if __name__ == "__main__":
    main()
