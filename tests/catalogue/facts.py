"""Mistakes of arithmetic, outside of any layer: the wrong number beside the right one."""

from __future__ import annotations

from math import sqrt

import torch

from spmd_moe.check import Layout
from spmd_moe.core import placement
from spmd_moe.core.placement import DENSE
from tests.catalogue.bug import Fact

# dp 4, tp 2 = edp 2, ep 2, etp 2. Every rank of dp has tokens of its own.
DP, EDP, EP = 4, 2, 2
EXPERTS = 8


def seen(summed_over: int) -> int:
    """Ranks' worth of tokens in an expert's gradient: those that were sent here, then the sum."""
    return EP * summed_over


def beside(role: placement.Role) -> list[int]:
    """The ranks that are in a group with rank 0 where ep is 1 and etp is larger than tp."""
    layout = Layout(dp=4, tp=2, etp=4)
    others = (r for r in layout.sizes if r is not role and (r in DENSE) == (role in DENSE))
    fixed = list(others)
    return [n for n in range(8) if all(layout.place(n)[r] == 0 for r in fixed)]


def in_bfloat16(n: int) -> float:
    return float(torch.tensor(float(n), dtype=torch.bfloat16) + 1)


def names(local: bool) -> set[str]:
    own = EXPERTS // EP
    return {f"experts.{i if local else i + rank * own}" for rank in range(EP) for i in range(own)}


FACTS = [
    Fact("B17a", "an expert's gradient is divided by edp, a dense one's by dp",
         seen(EDP) / EDP, seen(EDP) / DP, open="plan: one divisor for every parameter"),
    Fact("B17b", "an expert's gradient is divided by ep once more",
         seen(EDP) / DP / EP, seen(EDP) / DP, open="plan: one divisor for every parameter"),
    Fact("B18a", "an axis of size 1 skips the sum, and the divisor with it",
         seen(1), seen(1) / EP, open="plan: every row has its divisor, for every size"),
    Fact("B19a", "ep is 1, so an expert that is cut on etp is reduced over the dense group",
         beside(placement.DP), beside(placement.EDP),
         open="plan: axes of a reduction come from the type"),
    Fact("B20d", "the ranks' norms are averaged, where their squares should be added",
         (3.0 + 4.0) / 2, sqrt(3.0**2 + 4.0**2), open="plan: one row says over which axes"),
    Fact("B35c", "the update of the bias is registered for the layers up to the first without one",
         ["layer 0"], ["layer 0", "layer 2"], open="plan: layers that have it are counted"),
    Fact("B37a", "counts in bfloat16 stop at 256",
         in_bfloat16(256), 257.0, open="plan: the dtype of a counter is declared"),
    Fact("B39a", "the mesh that the experts are wrapped with has no replicas",
         EDP // 2, EDP, open="plan: axes of reductions and shards together are all axes"),
    Fact("B40b", "an adapter that all experts share is reduced over edp alone",
         EDP, EDP * EP, open="plan: axes of a reduction come from the type"),
    Fact("B41a", "experts are saved under their number on this rank",
         names(local=True), names(local=False), open="plan: names and places cover the whole once"),
]  # fmt: skip
