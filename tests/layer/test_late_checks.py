"""On CUDA: `Local` reports NaN scores in a later call, and jitter raises during capture."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from spmd_moe import ConfigError, MoE, MoEConfig, MoEMesh, RouterConfig, RoutingError, init_weights
from tests.support.pretended_device import OnDevice, on_device, pretended_device, to_device


def made(jitter: float = 0.0, dtype: torch.dtype = torch.float32) -> MoE:
    layer = MoE(MoEConfig(64, 32, RouterConfig(8, top_k=2, jitter=jitter)), MoEMesh.single())
    init_weights(layer, layer.mesh, seed=0)
    to_device(layer.to(dtype))
    return layer


def tokens(value: float = 1.0) -> OnDevice:
    return on_device(torch.full((3, 64), value))


def test_nan_scores_are_told_by_the_next_call_without_a_wait() -> None:
    with pretended_device((9, 0)) as log:
        layer = made(dtype=torch.bfloat16)
        x, bad = (on_device(torch.full((3, 64), v).bfloat16()) for v in (1.0, math.nan))
        layer(x)
        layer(bad)
        with pytest.raises(RoutingError, match="1 of 1 rank in an earlier call"):
            layer(x)
        layer(x)  # raised once
        assert log.take() == []


def test_what_is_not_there_yet_is_told_later() -> None:
    with pretended_device() as log:
        layer = made()
        log.done = False
        layer(tokens(math.nan))
        for _ in range(3):
            layer(tokens())
        log.done = True
        with pytest.raises(RoutingError, match="in an earlier call"):
            layer(tokens())


def test_a_copy_of_the_layer_does_not_tell_it_again() -> None:
    with pretended_device():
        layer = made()
        layer(tokens(math.nan))
        again: Any = copy.deepcopy(layer.dispatcher)
        again._check._check_earlier(tokens())


def test_a_captured_graph_is_not_checked() -> None:
    with pretended_device() as log:
        layer = made().eval()
        log.capturing = True
        layer(tokens(math.nan))
        log.capturing = False
        layer(tokens())


def test_jitter_is_refused_under_capture() -> None:
    with pretended_device() as log:
        layer = made(jitter=0.1)
        log.capturing = True
        with pytest.raises(ConfigError, match="jitter is drawn while a CUDA graph is captured"):
            layer(tokens())
        layer.eval()(tokens())
