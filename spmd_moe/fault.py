"""Scores that are not finite, ids that name no expert: seen by one rank, reported by all it meets.

A rank that raised alone would leave its peers waiting for it. So the router only marks what it
sees; the mark travels with the sizes that a dispatcher exchanges first, and every rank that gets it
raises the same error, after that exchange and before the next.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    E  experts

from __future__ import annotations

import torch
from torch import nn

from spmd_moe.collectives import host_ints
from spmd_moe.errors import RoutingError, explain
from spmd_moe.placement import Tokens

# Marks of several ranks may be added up, and still tell the two apart.
_NOT_FINITE, _NO_SUCH_EXPERT = 1, 1 << 32


def unset(*shape: int) -> nn.Parameter:
    """A parameter that nobody has given a value yet: NaN, so that using it is an error."""
    return nn.Parameter(torch.full(shape, torch.nan))


def mark(logits_TE: Tokens, expert_ids_TK: Tokens | None) -> Tokens:
    """0 where all is well: an int64 that stays on the device."""
    total = logits_TE.detach().sum()
    found = (total - total).ne(0).to(torch.int64)  # only NaN and infinity less themselves are not 0
    if expert_ids_TK is None:
        return found
    wrong_TK = (expert_ids_TK < -1) | (expert_ids_TK >= logits_TE.shape[1])
    return found * _NOT_FINITE + wrong_TK.any().to(torch.int64) * _NO_SUCH_EXPERT


def check_alone(marked: Tokens) -> None:
    """For a rank that exchanges nothing. Left out where the read would be the only one: it would
    wait for a device, or break a compiled graph in two."""
    if marked.device.type == "cpu" and not torch.compiler.is_compiling():
        (marks,) = host_ints(marked.view(1))
        check(marks, "1 rank")


def check(marks: int, where: str) -> None:
    """Raise if any of the marks, added up, is set."""
    if not marks:
        return
    scores, ids = marks % _NO_SUCH_EXPERT, marks // _NO_SUCH_EXPERT
    if scores:
        raise RoutingError(
            explain(
                "Router",
                f"scores are NaN or infinite on {scores} of {where}",
                why="such a token has no best expert, and its gradient would spoil all weights",
                fixes=[
                    "init_weights(layer, mesh, seed=0)   # weights that nobody has set are NaN",
                    "assert x.isfinite().all()   # before the layer, to find where they begin",
                ],
            )
        )
    raise RoutingError(
        explain(
            "Router",
            f"expert_ids name experts that do not exist on {ids} of {where}",
            why="ids run from 0 to num_experts - 1, and -1 is no expert",
            fixes=["expert_ids = expert_ids.where(expert_ids < num_experts, -1)"],
        )
    )
