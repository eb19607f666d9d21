"""Time of the layer, beside the loop over experts that a good engineer writes by hand.

One process, one thread, CPU. Both have the same weights and take turns in one run, so that what
disturbs one disturbs both. Shown are medians in milliseconds of CPU time (what others take of the
core does not count) and the ratio ours / loop, beside the ratio that we want.

python tests/bench/layer.py                          # all rows, about 4 minutes
python tests/bench/layer.py --part layer --dtype float32 --tokens 8
python tests/bench/layer.py --experts 8 --top-k 2 --width 256 --hidden 512

forward   without gradients, the layer in eval mode
training  forward and backward, gradients of tokens and of all weights, the layer in train mode
error     in training, against the same in float64: |difference| / |reference|, the largest of the
          output and all gradients; or of those where ours is above the loop's: there must be none
"""

# Shape letters in this file:
#   T  tokens     K  experts per token     D  model width     F  hidden width of an expert
#   E  experts

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
from spmd_moe.layer.combine import combine
from spmd_moe.layer.permute import Gather, sort_by_expert, take_scores
from spmd_moe.layer.router import count_choices
from tests.support.docs_blocks import DOCS, filled
from tests.support.hand_loop import expert_weights, loop_experts, loop_layer, loop_router


@final
@dataclass(frozen=True)
class Row:
    """One thing to measure: how long each of the two may take in all, and the ratio we want."""

    dtype: torch.dtype
    tokens: int
    training: bool
    target: float

    def name(self) -> str:
        kind = "training" if self.training else "forward"
        return f"{short(self.dtype):<10}{kind:<10}{self.tokens:>6}"


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ROWS = [
    Row(FLOAT32, 1, False, 1.05),
    Row(FLOAT32, 8, False, 1.05),
    Row(FLOAT32, 128, False, 1.05),
    Row(FLOAT32, 2048, False, 1.05),
    Row(FLOAT32, 1, True, 0.90),
    Row(FLOAT32, 8, True, 0.75),
    Row(FLOAT32, 128, True, 0.75),
    Row(FLOAT32, 2048, True, 1.05),
    Row(BFLOAT16, 4, True, 0.45),
    Row(BFLOAT16, 128, True, 0.12),
    Row(BFLOAT16, 2048, True, 0.06),
]
LEAST, MOST = 3, 1000  # turns of each; fewer than LEAST only where the loop is slow beyond patience
SLOW = 10.0  # seconds of one turn


@final
@dataclass(frozen=True)
class Sizes:
    width: int
    hidden: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        each = f"{self.experts} experts, {self.top_k} for each token"
        return f"width {self.width}, hidden {self.hidden}, {each}"


@final
class Pair:
    """Ours and the loop on the same tokens and weights; `alone` leaves the router out of both."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, tokens: int, *, alone: bool) -> None:
        mesh = MoEMesh.single()
        router = RouterConfig(sizes.experts, sizes.top_k)
        self.sizes, self.alone = sizes, alone
        self.layer = MoE(MoEConfig(sizes.width, sizes.hidden, router), mesh)
        init_weights(self.layer, mesh, seed=0, std=sizes.width**-0.5)
        self.layer.to(dtype)
        random = torch.Generator().manual_seed(1)
        x_TD, dy_TD = torch.randn(2, tokens, sizes.width, generator=random).to(dtype)
        self.x_TD, self.dy_TD = x_TD.clone().requires_grad_(), dy_TD.clone()
        scores_TK, self.ids_TK = loop_router(x_TD, self._gate(), sizes.top_k)
        self.scores_TK = scores_TK.detach().requires_grad_()

    def functions(self) -> dict[str, Callable[[], Tensor]]:
        if self.alone:
            return {"ours": self._our_experts, "loop": self._loop_experts}
        return {"ours": lambda: self.layer(self.x_TD).hidden, "loop": self._loop_layer}

    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        beside = self.scores_TK if self.alone else self._gate()
        return [self.x_TD, beside, *expert_weights(self.layer)]

    def step(self, function: Callable[[], Tensor]) -> None:
        for leaf in self.leaves():
            leaf.grad = None
        function().backward(self.dy_TD)

    def results(self, function: Callable[[], Tensor]) -> list[Tensor]:
        """The output and all gradients."""
        for leaf in self.leaves():
            leaf.grad = None
        y_TD = function()
        y_TD.backward(self.dy_TD)
        return [y_TD.detach(), *(grad_of(leaf) for leaf in self.leaves())]

    def reference(self) -> list[Tensor]:
        """The same in float64, for the choices that were made in `dtype`."""
        x_TD, beside, w1, w3, w2 = (t.detach().double().requires_grad_() for t in self.leaves())
        scores_TK = beside
        if not self.alone:
            scores_TK = torch.softmax(x_TD @ beside.T, 1).gather(1, self.ids_TK)
        y_TD = loop_experts(x_TD, scores_TK, self.ids_TK, (w1, w3, w2))
        y_TD.backward(self.dy_TD.double())
        return [y_TD.detach(), *(grad_of(leaf) for leaf in (x_TD, beside, w1, w3, w2))]

    def _gate(self) -> Tensor:
        return self.layer.router.weight_ED

    def _loop_layer(self) -> Tensor:
        return loop_layer(self.x_TD, self.layer, self.sizes.top_k)

    def _loop_experts(self) -> Tensor:
        return loop_experts(self.x_TD, self.scores_TK, self.ids_TK, expert_weights(self.layer))

    def _our_experts(self) -> Tensor:
        slots = sort_by_expert(self.ids_TK, every_slot=True)
        counts_E = count_choices(self.ids_TK, self.sizes.experts)
        scores_R = take_scores(self.scores_TK, slots)
        gather = Gather(slots.token_N, slots.row_TK)
        return combine(self.layer.experts(self.x_TD, counts_E, scores_R, gather), slots)


def grad_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def turns(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median CPU seconds of each, in turn, for so many seconds in all; the first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    begun = time.perf_counter()
    while True:
        for name, function in functions.items():
            begin = time.process_time()
            function()
            taken[name].append(time.process_time() - begin)
        number, spent = len(taken["ours"]), time.perf_counter() - begun
        if number > MOST or (number > LEAST and spent > seconds) or spent > SLOW:
            break
    warm = slice(1, None) if number > 1 else slice(None)
    return {name: statistics.median(times[warm]) for name, times in taken.items()}


def measure(pair: Pair, row: Row, seconds: float) -> dict[str, float]:
    functions = pair.functions()
    pair.layer.train(row.training)
    if row.training:
        return turns({name: partial(pair.step, f) for name, f in functions.items()}, seconds)
    with torch.no_grad():
        return turns(dict(functions), seconds)


def errors(pair: Pair) -> tuple[float, float]:
    """Ours and the loop's, where ours is the largest: among the tensors where it is above the
    loop's, if there are any."""
    reference = pair.reference()

    def of(name: str) -> list[float]:
        found = pair.results(pair.functions()[name])
        return [distance(a, b) for a, b in zip(found, reference, strict=True)]

    found = list(zip(of("ours"), of("loop"), strict=True))
    above = [(ours, loop) for ours, loop in found if not ours <= loop]  # or NaN
    return max(above or found)


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference).norm() / reference.norm())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return found[1] if found else "unknown CPU"


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def show(
    rows: Sequence[Row], sizes: Sizes, part: str, seconds: float
) -> tuple[dict[Row, float], int]:
    """Measure and print; the ratios, and how many targets were missed."""
    ratios, missed = dict[Row, float](), 0
    print(f"\n{part}")
    print(f"{'dtype':<10}{'what':<10}{'T':>6}{'ours ms':>10}{'loop ms':>10}{'ratio':>7}{'want':>7}")
    for row in rows:
        pair = Pair(sizes, row.dtype, row.tokens, alone=part == "experts alone")
        took = measure(pair, row, seconds)
        ratios[row] = ratio = took["ours"] / took["loop"]
        line = f"{row.name()}{took['ours'] * 1e3:>10.2f}{took['loop'] * 1e3:>10.2f}{ratio:>7.3f}"
        met = ratio <= row.target
        print(f"{line}{row.target:>7.2f}  {verdict(met):<8}", end="", flush=True)
        missed += not met
        if row.training and row.dtype is BFLOAT16:
            ours, loop = errors(pair)
            missed += not ours <= loop
            print(f"error {ours:.2e}, loop {loop:.2e}  {verdict(ours <= loop)}", end="")
        print(flush=True)
    return ratios, missed


def table(ratios: dict[Row, float], machine: str) -> str:
    """The ratios in Markdown: numbers of tokens beside each other."""
    tokens = sorted({row.tokens for row in ratios})
    lines = [f"| tokens | {' | '.join(map(str, tokens))} |", "| --- |" + " --- |" * len(tokens)]
    for dtype, training in dict.fromkeys((row.dtype, row.training) for row in ratios):
        found = {
            r.tokens: f"{q:.2f}"
            for r, q in ratios.items()
            if (r.dtype, r.training) == (dtype, training)
        }
        kind = "training" if training else "forward"
        cells = " | ".join(found.get(n, "") for n in tokens)
        lines.append(f"| {short(dtype)}, {kind} | {cells} |")
    return "\n".join([*lines, "", f"Measured on {machine}."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("layer", "experts"), help="one of the two (both)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="rows of one dtype (both)")
    parser.add_argument("--tokens", type=int, help="rows of one number of tokens (all)")
    parser.add_argument("--kind", choices=("forward", "training"), help="rows of one kind (both)")
    parser.add_argument("--seconds", type=float, default=6.0, help="spent on a row, about (6)")
    parser.add_argument("--width", type=int, default=512, help="D, of a token (512)")
    parser.add_argument("--hidden", type=int, default=1024, help="F, inside an expert (1024)")
    parser.add_argument("--experts", type=int, default=32, help="E (32)")
    parser.add_argument("--top-k", type=int, default=4, help="K, experts of a token (4)")
    parser.add_argument(
        "--write", action="store_true", help="put the layer's table in docs/benchmarks.md"
    )
    args = parser.parse_args()
    rows = [
        row
        for row in ROWS
        if args.tokens in (None, row.tokens)
        and args.dtype in (None, short(row.dtype))
        and args.kind in (None, "training" if row.training else "forward")
    ]
    if not rows:
        parser.error("no row has that dtype, kind and number of tokens")
    if args.write and (rows != ROWS or args.part == "experts"):
        parser.error("the table of the docs has all rows of the layer: use --write without choices")
    torch.set_num_threads(1)
    sizes = Sizes(args.width, args.hidden, args.experts, args.top_k)
    machine = f"{date.today()}, {cpu_name()}, torch {torch.__version__}, 1 thread; {sizes}"
    print(machine)
    missed = 0
    if args.part != "experts":
        ratios, missed = show(rows, sizes, "whole layer", args.seconds)
        if args.write:
            page = DOCS / "benchmarks.md"
            page.write_text(filled(page.read_text(), "speed", table(ratios, machine)))
    if args.part != "layer":
        # The loop in bfloat16 takes minutes for many tokens; once, for the layer, is enough.
        quick = [row for row in rows if row.dtype is FLOAT32 or row.tokens < 2048]
        missed += show(quick, sizes, "experts alone", args.seconds)[1]
    print(f"\n{missed} missed")


if __name__ == "__main__":
    main()
