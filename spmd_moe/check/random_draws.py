"""Operations that draw random numbers, and the seed that they draw from (X2).

Ranks have generators of their own. What they draw is the same on all of them only where the program
seeds alike: by `generator=`, or by `torch.manual_seed` in the code that is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

_ALWAYS = {
    *("rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like", "randint_like"),
    *("bernoulli", "multinomial", "poisson", "gumbel_softmax", "normal_", "uniform_", "random_"),
    *("exponential_", "bernoulli_", "geometric_", "cauchy_", "log_normal_"),
}
_DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
             "feature_alpha_dropout"}  # fmt: skip


def is_random(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws random numbers, with the arguments that it is given."""
    if name in _DROPOUTS:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(training) and p > 0
    if name == "scaled_dot_product_attention":
        p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        return bool(p > 0)
    return name in _ALWAYS


def seed_of(leaves: Iterable[Any], before: int) -> int | None:
    """The seed that the checked code set: that of its generator, or of torch's since `before`."""
    given = [x.initial_seed() for x in leaves if isinstance(x, torch.Generator)]
    seed = given[0] if given else torch.initial_seed()
    return seed if given or seed != before else None
