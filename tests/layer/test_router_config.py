"""Router settings that are refused, with the reason and a fix that is accepted."""

from __future__ import annotations

import re
from math import inf
from typing import Any

import pytest
import torch

from spmd_moe import ConfigError, RouterConfig
from spmd_moe.layer.router_scores import SCORES

WHOLE = "; it must be an integer of 1 or more."
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"num_experts": 0, "top_k": 1}, f"num_experts is 0{WHOLE}", "number of something"),
    *(
        ({"num_expert_groups": 2, name: n}, f"{name} is {n}{WHOLE}", "number of something")
        for name in ("top_k", "num_expert_groups", "num_limited_groups")
        for n in (0, -1, 2.0, True, None)
    ),
    ({"top_k": 9}, "top_k is 9, of 8 experts.", "at least one and at most all"),
    ({"score_func": "hard"}, "score_func is 'hard'.", ", ".join(map(repr, SCORES))),
    (
        {"top_k": 1, "route_norm": True},
        "top_k is 1, score_func 'softmax', route_norm True.",
        "always 1",
    ),
    (
        {"top_k": 1, "score_func": "softmax_chosen"},
        "top_k is 1, score_func 'softmax_chosen', route_norm False.",
        "no gradient would reach the router",
    ),
    ({"num_expert_groups": 3}, "8 experts are in 3 groups.", "equal in size"),
    (
        {"num_expert_groups": 2, "num_limited_groups": 3},
        "num_limited_groups is 3, of 2 groups.",
        "at most all",
    ),
    (
        {"num_expert_groups": 4, "top_k": 3},
        "top_k is 3, but 1 of 4 groups have 2 experts.",
        "it keeps",
    ),
    ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16.", "float32 or wider"),
    ({"route_scale": inf}, "route_scale is inf; it must be a finite number above 0.", "multiplied"),
    ({"jitter": 1.0}, "jitter is 1.0; it must be a number from 0 to below 1.", "scaled by"),
    ({"jitter": -0.1}, "jitter is -0.1; it must be a number from 0 to below 1.", "scaled by"),
    ({"jitter": inf}, "jitter is inf; it must be a number from 0 to below 1.", "scaled by"),
]


def test_an_integer_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="route_scale is inf; it must be a finite number above 0"):
        RouterConfig(8, 2, route_scale=10**400)


@pytest.mark.parametrize(("settings", "what", "why"), REFUSED, ids=lambda case: str(case))
def test_refused(settings: dict[str, Any], what: str, why: str) -> None:
    """Says what is wrong and why; and the fix that it offers, taken as it stands, is accepted."""
    asked: dict[str, Any] = {"num_experts": 8, "top_k": 2} | settings
    with pytest.raises(ConfigError, match=r"^RouterConfig: ") as caught:
        RouterConfig(**asked)
    head, reason, fix, at = str(caught.value).splitlines()
    assert head == f"RouterConfig: {what}"
    assert reason.startswith("  why: ") and why in reason
    assert re.fullmatch(r"  at:  .*test_router_config\.py:\d+", at)
    offered = eval(f"dict({fix.removeprefix('  fix: ')})", {"torch": torch})
    RouterConfig(**asked | offered)
