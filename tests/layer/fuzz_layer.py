"""Random layers on random layouts, against the oracle of one process in float64.

    python -m tests.layer.fuzz_layer --seconds 3600 --seed 1

`test_layer_fuzz.py` runs some with a fixed seed. Outputs, counts, and the gradients of the input
and of every weight are compared. The oracle (tests/support/layer_oracle.py) loops over tokens and
shares no code with the layer. A case depends on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmd_moe.check.thread_ranks import RanksError, threaded
from spmd_moe.core.errors import ConfigError
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.moe_config import ExpertRecompute, MoEConfig, ScoreApplication, SharedConfig
from spmd_moe.layer.router import RouterConfig
from tests.support.dispatchers import ROOM
from tests.support.layer_cases import HELD, layouts
from tests.support.layer_layouts import Case, Layout
from tests.support.layer_runs import compare, run_rank

WORLDS = (1, 2, 2, 3, 4, 4, 6, 8)
SCORES: tuple[Any, ...] = ("softmax", "sigmoid", "sqrt_softplus", "softmax_chosen")
STEERS = ("one expert", "next rank", "some none", "", "", "")  # the first names expert 3
SPREADS = ("even", "ragged", "last")


@dataclass(frozen=True)
class Drawn(Case):
    """A case with values of its own."""

    seed: int = 0

    def draw(self, what: str, rank: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash_of(f"{self.seed} {what} {rank}"))
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def hash_of(text: str) -> int:
    """A hash that, unlike `hash`, is the same in every process."""
    return random.Random(text).getrandbits(62)


def drawn(seed: int) -> Drawn:
    """The case of this seed.

    Raises:
        ConfigError: The settings that were drawn contradict each other.
    """
    draw = random.Random(seed)
    layout = draw.choice(list(layouts(draw.choice(WORLDS))))
    batch = draw.choice((1, 1, 2, 3))
    dispatcher = draw.choice(("", "", "all_to_all", "all_gather", "fixed"))
    most = 12 if dispatcher != "fixed" else min(12, ROOM // (4 * batch))
    router = _router(draw, layout)
    return Drawn(
        layout,
        _config(draw, layout, router),
        tuple(batch * rows for rows in _spread(draw, draw.randint(0, most), layout.world)),
        batch,
        dispatcher,
        masked=draw.random() < 0.3,
        steer=draw.choice(STEERS[router.num_experts <= 3 :]),
        seed=seed,
    )


def _router(draw: random.Random, layout: Layout) -> RouterConfig:
    experts = layout.ep * draw.randint(1, 4)
    groups = draw.choice([g for g in range(1, experts + 1) if experts % g == 0])
    top_k = draw.randint(1, min(4, experts))
    return RouterConfig(
        experts,
        top_k,
        score_func=draw.choice(SCORES),
        route_norm=draw.random() < 0.4,
        route_scale=draw.choice((1.0, 1.0, 2.5, 0.3)),
        num_expert_groups=groups,
        num_limited_groups=draw.randint(1, groups),
        group_score_top_k=draw.choice((1, 2)),
        dtype=torch.float64,
    )


def _config(draw: random.Random, layout: Layout, router: RouterConfig) -> MoEConfig:
    sharded = draw.random() < 0.5
    shared = SharedConfig(
        (layout.tp if sharded else 1) * draw.randint(1, 5),
        gated=draw.random() < 0.5,
        sharded=sharded,
    )
    return MoEConfig(
        dim=draw.randint(1, 9),
        hidden_dim=layout.etp * draw.randint(1, 6),
        router=router,
        shared=shared if draw.random() < 0.5 else None,
        src=draw.choice(HELD),
        dst=draw.choice(HELD),
        bias=draw.random() < 0.3,
        score_application=draw.choice(list(ScoreApplication)),
        recompute=draw.choice(list(ExpertRecompute)),
    )


def _spread(draw: random.Random, total: int, ranks: int) -> list[int]:
    """Tokens of each rank."""
    spread = draw.choice(SPREADS)
    if spread == "even":
        return list(ShardShape.even(total, ranks).sizes)
    if spread == "last":
        return [0] * (ranks - 1) + [total]
    owners = [draw.randrange(ranks) for _ in range(total)]
    return [owners.count(rank) for rank in range(ranks)]


def fuzz(seed: int, *, times: int | None = None, seconds: float = 0.0) -> Counter[str]:
    """Run a number of cases, or run for a number of seconds.

    Returns:
        How many cases were equal, were refused, and had tokens; and how many ranks they had.

    Raises:
        AssertionError: A case differs from the oracle, or raises.
    """
    torch.set_num_threads(1)
    counts, end, number = Counter[str](), time.monotonic() + seconds, 0
    while number < times if times is not None else time.monotonic() < end:
        case_seed = seed * 1_000_000 + number
        number += 1
        try:
            case = drawn(case_seed)
        except ConfigError:
            counts["refused"] += 1
            continue
        try:
            compare(case, threaded(case.layout.world, run_rank, case))
        except Exception as error:
            raised = error.errors.values() if isinstance(error, RanksError) else [error]
            if all(isinstance(each, ConfigError) for each in raised):
                counts["refused"] += 1
                continue
            raise AssertionError(f"case {case_seed}, {case}: {error}\n{dict(counts)}") from error
        counts["equal"] += 1
        counts[f"{case.layout.world} ranks"] += 1
        counts["with tokens"] += sum(case.tokens) > 0
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(dict(fuzz(asked.seed, seconds=asked.seconds)))


if __name__ == "__main__":
    main()
