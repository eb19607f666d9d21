"""Combine the rows of each token: apply the weights, unless the experts did, and add them."""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    N  slots that have an expert

from __future__ import annotations

from spmd_moe.core.placement import Tokens
from spmd_moe.layer.permute import Slots, fold, take_scores
from spmd_moe.layer.scaled_rows import scaled


def combine(rows_ND: Tokens, slots: Slots, scores_TK: Tokens | None = None) -> Tokens:
    """Add each token's rows, in the order of its choices; with scores, each times its weight."""
    if scores_TK is not None:
        rows_ND = scaled(rows_ND, take_scores(scores_TK, slots))
    return fold(rows_ND, slots)
