"""The layer in its configurations, on every layout of up to 8 ranks: the check must find nothing.

    python -m tests.support.checked_layers --world 8 --part 0 1

All combinations would be thousands for each layout. Each layout gets a few cases, drawn so that
over all layouts every two values of different factors meet; `missing_pairs` counts those that do
not. `--part i n` runs every n-th layout from the i-th on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch

from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, ShardShape, SharedConfig, init_weights
from spmd_moe.check import Case, Layout, run_checks
from spmd_moe.check.layouts import layouts
from spmd_moe.core.placement import CP, DP, TP, I, Placement, R, S, V
from spmd_moe.layer.boundary import INSIDE
from spmd_moe.layer.dispatch import AllGather, FixedCapacity
from spmd_moe.layer.moe_config import ScoreApplication

EXPERTS, WIDTH, HIDDEN = 24, 8, 48
GROUPED: dict[str, Any] = {"num_expert_groups": 4, "num_limited_groups": 2}
FACTORS: dict[str, tuple[Any, ...]] = {
    "dispatcher": ("default", "all_gather", "fixed"),
    "boundary": tuple(product((S(0), R, I), repeat=2)),
    "score": ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"),
    "groups": ({}, GROUPED),
    "shared": (None, SharedConfig(24), SharedConfig(24, gated=True), SharedConfig(24, True, True)),
    "score_application": tuple(ScoreApplication),
    "bias": (False, True),
    "balance": (None, "batch", "sequence"),
    "mask": (False, True),
    "ids": (False, True),
    "sequences": (0, 1, 2),  # 0: tokens without sequences
}
Choice = dict[str, Any]


def possible(case: Choice) -> bool:
    """What the layer refuses is no case."""
    src, dst = case["boundary"]
    sharded = case["shared"] is not None and case["shared"].sharded
    counts_rows = src not in (R, I) and (dst != src or sharded)
    if case["dispatcher"] == "fixed" and counts_rows:
        return False
    return bool(case["balance"] != "sequence" or case["sequences"])


def drawn(layout: Layout, number: int) -> list[Choice]:
    """A few cases for this layout, the same on every run."""
    draw, found = random.Random(str(layout)), list[Choice]()
    while len(found) < number:
        case = {name: draw.choice(values) for name, values in FACTORS.items()}
        if possible(case):
            found.append(case)
    return found


def missing_pairs(cases: Sequence[Choice]) -> set[tuple[str, str]]:
    """Pairs of values that could meet in a case, and do not."""
    met = {pair for case in cases for pair in _pairs(case)}
    return {pair for pair in _possible_pairs() if pair not in met}


def _pairs(case: Choice) -> Iterator[tuple[str, str]]:
    yield from combinations(sorted(f"{name}={value}" for name, value in case.items()), 2)


def _possible_pairs() -> Iterator[tuple[str, str]]:
    """Of factors that do not exclude each other; those that do are few, and tried out."""
    plain = {name: values[-1] for name, values in FACTORS.items()}
    plain |= {"dispatcher": "default", "balance": None, "sequences": 1}
    for a, b in combinations(FACTORS, 2):
        for x, y in product(FACTORS[a], FACTORS[b]):
            case = plain | {a: x, b: y}
            if possible(case):
                yield from (p for p in _pairs(case) if p == tuple(sorted((f"{a}={x}", f"{b}={y}"))))


class Grid:
    """The target of a case."""

    def __init__(self, case: Choice) -> None:
        self.case = case

    def __call__(self, mesh: MoEMesh, tokens: int) -> Case:
        case, (src, dst) = self.case, self.case["boundary"]
        router = RouterConfig(EXPERTS, 4, score_func=case["score"], **case["groups"])
        names = ("shared", "score_application", "bias", "balance")
        config = MoEConfig(
            WIDTH, HIDDEN, router, src=src, dst=dst, **{name: case[name] for name in names}
        )
        tp, whole = mesh[TP], src in (R, I)
        rows = tokens if whole else ShardShape.even(tokens, tp.size).sizes[tp.rank]
        module = MoE(config, mesh, self._dispatcher(mesh, max(1, tokens)))
        init_weights(module, mesh, seed=0)
        lead = (case["sequences"], rows) if case["sequences"] else (rows,)
        x = torch.randn(*lead, WIDTH)
        mask = torch.arange(x[..., 0].numel()).view(lead) % 3 != 1 if case["mask"] else None
        ids = torch.randint(-1, EXPERTS, (*lead, 4)) if case["ids"] else None
        # Tokens of sequences that are cut along their length are the rank's own, in no order.
        on_tp = src if src != INSIDE else S(1) if case["sequences"] else S(0)
        placed = Placement((DP[V], CP[V], TP[on_tp]))
        return Case(module, (x, mask, ids), (placed, placed, placed))

    def _dispatcher(self, mesh: MoEMesh, tokens: int) -> Any:
        if self.case["dispatcher"] == "all_gather":
            return AllGather(mesh, EXPERTS)
        if self.case["dispatcher"] == "fixed":
            return FixedCapacity(mesh, EXPERTS, 8 * tokens)
        return None


def run(chosen: Sequence[Layout], number: int, tokens: Sequence[int] = ()) -> list[str]:
    """What is found, with the case that shows it."""
    said = []
    for layout in chosen:
        if EXPERTS % layout.ep or HIDDEN % layout.etp or HIDDEN % layout.tp:
            continue  # refused by the layer
        for case in drawn(layout, number):
            report = run_checks(Grid(case), chosen=[layout], tokens=tokens, packages=["spmd_moe"])
            if not report.ok:
                said.append(f"{layout}: {case}\n{report}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1))
    args = parser.parse_args()
    torch.set_num_threads(1)
    first, step = args.part
    chosen = list(layouts(args.world))[first::step]
    said = run(chosen, args.cases)
    cases = [case for layout in chosen for case in drawn(layout, args.cases)]
    print("\n".join(said))
    met = f"{len(missing_pairs(cases))} of {len(set(_possible_pairs()))} pairs do not meet"
    print(f"{len(said)} false alarms in {len(cases)} cases of {len(chosen)} layouts; {met}")


if __name__ == "__main__":
    main()
