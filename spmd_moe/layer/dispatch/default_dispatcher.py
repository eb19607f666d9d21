"""The default dispatcher of a layer: chosen from sizes only, so it is the same on all ranks."""

from __future__ import annotations

import math
from typing import Any

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import EP, ETP
from spmd_moe.layer.dispatch.all_to_all import AllToAll
from spmd_moe.layer.dispatch.dedup_all_to_all import DedupAllToAll
from spmd_moe.layer.dispatch.local import Local
from spmd_moe.layer.dispatch.protocol import Dispatcher

# `DedupAllToAll` has one more exchange, of a number for each choice, and sorts twice. So it is the
# default where it sends at most this share of the rows of `AllToAll`.
_SHARE = 0.75


def default_dispatcher(mesh: MoEMesh, num_experts: int, top_k: int) -> Dispatcher[Any]:
    if mesh[EP].size * mesh[ETP].size == 1:
        return Local(mesh)
    sent = expected_ranks(num_experts, top_k, mesh[EP].size)
    kind = DedupAllToAll if sent <= _SHARE * top_k else AllToAll
    return kind(mesh, num_experts)


def expected_ranks(num_experts: int, top_k: int, ranks: int) -> float:
    """The expected number of ranks that have an expert of a token, all choices equally likely.

    A rank is left out if all choices are among the experts of the others.
    """
    top_k = min(top_k, num_experts)  # the other choices are identity experts
    others = num_experts - num_experts // ranks
    return ranks * (1 - math.comb(others, top_k) / math.comb(num_experts, top_k))
