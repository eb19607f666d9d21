"""Router scores: what experts are ranked and weighed by, as functions of the logits.

Scores are normalized as a softmax of their logarithms. A score can be too small for its dtype: a
sigmoid is 0 in float32 from a logit of -104 on, and long before, a division by the sum of such
scores has gradients that are too large.
"""

# Shape letters in this file:
#   T  tokens    E  experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
import torch.nn.functional as F

from spmd_moe.core.placement import Tokens

ScoreName: TypeAlias = Literal["softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"]
RankName: TypeAlias = Literal["logits", "softmax", "sigmoid", "sqrt_softplus"]

LOG_OF_NONE = torch.finfo(torch.float32).min  # of the score of no expert


@final
@dataclass(frozen=True, slots=True)
class Score:
    """The scores of logits, and their logarithms, which may be off by a constant for each token."""

    of_logits: Callable[[Tokens], Tokens]
    log: Callable[[Tokens], Tokens]
    is_probs: bool = False  # the scores of all experts sum to 1
    normalized: bool = False  # the weights of the chosen experts sum to 1 in any case


def _softmax(logits_TE: Tokens) -> Tokens:
    return logits_TE.softmax(1)


def _same(logits_TE: Tokens) -> Tokens:
    return logits_TE


def _sqrt_softplus(logits_TE: Tokens) -> Tokens:
    root_TE = torch.sqrt(_softplus(logits_TE))
    # Clamped, because the gradient of an overflowing exponential is NaN even if it is not selected.
    small_TE = torch.exp(logits_TE.clamp(max=_AS_EXP) / 2)
    return torch.where(logits_TE < _AS_EXP, small_TE, root_TE)


def _log_sqrt_softplus(logits_TE: Tokens) -> Tokens:
    log_TE = torch.log(_softplus(logits_TE))
    return torch.where(logits_TE < _AS_EXP, logits_TE, log_TE) / 2


_AS_EXP = -40.0  # below it, softplus(x) and exp(x) are the same number, also in float64


def _softplus(logits_TE: Tokens) -> Tokens:
    # Clamped, since the root and the logarithm of 0 have no slope.
    return F.softplus(logits_TE.clamp(min=_AS_EXP))


SCORES: dict[str, Score] = {
    "softmax": Score(_softmax, _same, is_probs=True),
    "softmax_chosen": Score(_same, _same, normalized=True),
    "sigmoid": Score(torch.sigmoid, F.logsigmoid),
    "sqrt_softplus": Score(_sqrt_softplus, _log_sqrt_softplus),
}

# Scores that can rank experts, apart from the scores that weigh them.
RANKS: dict[str, Callable[[Tokens], Tokens]] = {
    "logits": _same,
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}
