"""Mutants of the layer that nothing objects to, and why that is no hole."""

from __future__ import annotations

_SAME = "INSIDE is S(0): the same program"
_COUNTS = "R and I differ in their gradients alone, and numbers that the host reads have none"
_IN_TURN = "choices in turn are for benchmarks, and no module that is checked here has them"

_FORECAST = "a number of the plan, which tests/check/test_forecast.py compares with a run"

ARGUED: dict[str, str] = {
    "boundary:own_rows:dst=S(0):1": _SAME,
    "boundary:leave:src=S(0):1": _SAME,
    "boundary:_shape:dst=I:1": _COUNTS,
    "router:__call__:retyped:2": _IN_TURN,
    "router:__call__:retyped:3": _IN_TURN,
    "dispatch.fixed_capacity:forecast:factor left out:1": _FORECAST,
    "dispatch.fixed_capacity:forecast:factor left out:2": _FORECAST,
    "dispatch.fixed_capacity:forecast:factor left out:3": _FORECAST,
    "dispatch.fixed_capacity:forecast:factor left out:4": _FORECAST,
}
