"""The cases of the layer: every layout of some worlds, and on each a few of everything else.

All combinations would be a hundred thousand. Here each layout gets its own random few, and
`test_moe.py` proves that every two values of different factors meet somewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from spmd_moe.core.placement import I, Kind, R, S
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.moe_config import ExpertRecompute, MoEConfig, ScoreApplication, SharedConfig
from spmd_moe.layer.router_config import RouterConfig
from tests.support.layer_layouts import Case, Layout, seed_of

WORLDS = (1, 2, 3, 4, 6, 8)
EXPERTS = WIDE = 24  # what all of these worlds divide
PLAIN = RouterConfig(EXPERTS, 2, dtype=torch.float64)

# What may differ between layers, as changes to a plain one; then what may differ in the tokens.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "one choice": ({"router": replace(PLAIN, top_k=1)}, {"masked": True}),
    "softmax of the chosen": (
        {
            "router": replace(PLAIN, score_func="softmax_chosen", top_k=3),
            "shared": SharedConfig(4, gated=True),
        },
        {},
    ),
    "groups": (
        {
            "router": replace(
                PLAIN,
                score_func="sigmoid",
                route_norm=True,
                route_scale=2.5,
                num_expert_groups=4,
                num_limited_groups=2,
                top_k=4,
            ),
            "shared": SharedConfig(WIDE, sharded=True),
        },
        {},
    ),
    "weighed late": (
        {
            "router": replace(PLAIN, score_func="sqrt_softplus"),
            "score_application": ScoreApplication.IN_COMBINE,
        },
        {},
    ),
    "biases": ({"bias": True}, {"steer": "some none"}),
    "masked": (
        {"shared": SharedConfig(WIDE, True, True), "recompute": ExpertRecompute.FIRST_MATMULS},
        {"masked": True},
    ),
    "masked, late, biases": (
        {"score_application": ScoreApplication.IN_COMBINE, "bias": True},
        {"masked": True},
    ),
    "weighed input": (
        {"score_application": ScoreApplication.ON_INPUT, "bias": True},
        {"steer": "some none"},
    ),
    "two scores": (
        {
            "router": replace(
                PLAIN,
                score_func="sigmoid",
                choose_by="logits",
                logit_softcap=1.5,
                route_norm=True,
                norm_eps=0.5,
                expert_scale=True,
                input_dim=5,
            ),
            "score_application": ScoreApplication.ON_INPUT,
        },
        {"masked": True},
    ),
    "excluded by 0": (
        {
            "router": replace(
                PLAIN,
                choose_by="logits",
                num_expert_groups=EXPERTS,  # of one each, as scores of 0 are all alike
                num_limited_groups=EXPERTS - 1,
                group_score_top_k=1,
                excluded_score=0.0,
                top_k=20,
            )
        },
        {},
    ),
    "identity experts": (
        {"router": replace(PLAIN, num_zero_experts=12, top_k=3), "shared": SharedConfig(4)},
        {"masked": True},
    ),
    "given": ({"router": replace(PLAIN, given=True)}, {"steer": "next rank", "masked": True}),
    "one expert": ({"recompute": ExpertRecompute.FIRST_MATMULS}, {"steer": "one expert"}),
    "next rank": ({"shared": SharedConfig(4)}, {"steer": "next rank", "masked": True}),
}

HELD: tuple[Kind, ...] = (S(0), R, I)
BOUNDARIES = list(product(HELD, HELD))
FACTORS: dict[str, list[Any]] = {
    "boundary": BOUNDARIES,
    "dispatcher": ["", "dedup", "all_gather"],
    "tokens": ["0", "1", "n-1", "n", "n+1", "2n+3"],
    "spread": ["even", "ragged", "last"],
    "batch": [1, 3],
    "variant": [*VARIANTS, "two scores", "given"],  # drawn twice as often: inputs of their own
}


def layouts(world: int) -> Iterator[Layout]:
    """Every (dp, cp, tp) with every (ep, etp)."""
    ways = [(a, b, world // (a * b)) for a, b in product(range(1, world + 1), repeat=2)]
    ways = [way for way in ways if way[0] * way[1] * way[2] == world]
    for (dp, cp, tp), (_, ep, etp) in product(ways, ways):
        yield Layout(dp, cp, tp, ep, etp)


def choices(layout: Layout, number: int) -> Iterator[dict[str, Any]]:
    """`number` ways to fill the factors, the same on every run."""
    draw = random.Random(f"{seed_of(layout)}/91")
    for _ in range(number):
        yield {name: draw.choice(values) for name, values in FACTORS.items()}


def case(layout: Layout, choice: dict[str, Any]) -> Case:
    changes, tokens = VARIANTS[choice["variant"]]
    src, dst = choice["boundary"]
    plain = MoEConfig(dim=6, hidden_dim=WIDE, router=PLAIN, src=src, dst=dst)
    ranks = layout.world
    total = {"0": 0, "1": 1, "n-1": ranks - 1, "n": ranks, "n+1": ranks + 1, "2n+3": 2 * ranks + 3}
    rows = _spread(total[choice["tokens"]], choice["spread"], layout)
    return Case(
        layout,
        replace(plain, **changes),
        tuple(choice["batch"] * n for n in rows),
        choice["batch"],
        choice["dispatcher"],
        **tokens,
    )


def _spread(total: int, spread: str, layout: Layout) -> list[int]:
    """Tokens of each rank."""
    ranks = layout.world
    if spread == "even":
        return list(ShardShape.even(total, ranks).sizes)
    if spread == "last":
        return [0] * (ranks - 1) + [total]
    draw = random.Random(f"{seed_of(layout)}/{total}")
    owners = [draw.randrange(ranks) for _ in range(total)]
    return [owners.count(rank) for rank in range(ranks)]
