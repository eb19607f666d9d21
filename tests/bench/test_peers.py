"""Exact counts of the layer: a change that makes them worse fails here, on any machine."""

from __future__ import annotations

import pytest
import torch

from tests.bench.peers.layers import FINE, WIDE, Sizes, layers
from tests.bench.peers.measure import counts, tokens, waits

# Operators that move data, and the MiB that they read and write, rounded up. Fewer is better:
# a change that needs fewer lowers the number here.
MOST = {
    (WIDE, torch.float32, False): (27, 609),
    (WIDE, torch.float32, True): (60, 2187),
    (WIDE, torch.bfloat16, False): (29, 315),
    (WIDE, torch.bfloat16, True): (66, 1121),
    (FINE, torch.float32, False): (27, 363),
    (FINE, torch.float32, True): (60, 1226),
    (FINE, torch.bfloat16, False): (29, 197),
    (FINE, torch.bfloat16, True): (66, 649),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [WIDE, FINE], ids=str)
def test_counts(sizes: Sizes, dtype: torch.dtype) -> None:
    """At 2,048 tokens; the number of operators is the same for each number of tokens."""
    (layer, *peers), _ = layers(sizes, dtype, device="meta")
    for training in (False, True):
        made = counts([layer, *peers], tokens(sizes, 2048, dtype, "meta"), training=training)
        ours, (operators, mebibytes) = made["ours"], MOST[sizes, dtype, training]
        assert ours.operators == operators
        assert mebibytes - 1 < ours.moved / 2**20 <= mebibytes
        few = counts([layer], tokens(sizes, 8, dtype, "meta"), training=training)["ours"]
        assert few.operators == operators
        if training:
            assert all(ours.kept <= 0.42 * made[peer.name].kept for peer in peers)


def test_no_wait_of_the_host() -> None:
    assert waits(Sizes(64, 64, 4, 2))["ours"] == 0
