"""The record that the layer returns. Used as a tensor, it raises an error that names `.hidden`."""

# Shape letters in this file:
#   E  experts

from __future__ import annotations

from dataclasses import dataclass
from functools import partialmethod
from typing import NoReturn, final

from torch import Tensor
from torch.export import register_dataclass

from spmd_moe.core.errors import OutputError, explain
from spmd_moe.core.placement import TokenSums
from spmd_moe.layer.balance_losses import LossTerms


@final
@dataclass(frozen=True, slots=True)
class MoEOutput:
    """What the layer returns: tokens, loss terms, and counts of choices.

    Attributes:
        hidden: The tokens, with the shape and dtype of the input, placed as `dst` on tp.
        losses: The sums from which losses are computed; None if `MoEConfig.balance` is None.
        counts_E: int64, choices of each expert by this rank's tokens; P on dp, cp and tp.
        dropped: int64, choices that no expert received, except those of masked tokens; P.

    Example:
        >>> import torch
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> out = layer(torch.ones(3, 8))
        >>> tuple(out.hidden.shape), int(out.counts_E.sum()), out.losses
        ((3, 8), 6, None)
    """

    # spmd: allow unknown - MoEConfig.dst, a setting, says how it is placed on tp
    hidden: Tensor  # of the shape and dtype of x, on tp of the kind `dst`
    losses: LossTerms | None  # None where MoEConfig.balance is None
    counts_E: TokenSums  # int64; on tp a sum over ranks too, at any boundary
    dropped: TokenSums  # int64: choices of no expert, or that found no room; not of masked tokens


register_dataclass(MoEOutput)  # as its losses are


# --- used as a tensor -------------------------------------------------------------------------


def _refuse(use: str) -> NoReturn:
    raise OutputError(
        explain(
            "MoE.forward",
            f"the result is an MoEOutput, but {use} needs a tensor",
            why="an MoEOutput holds the tokens, and what losses and counters need",
            fixes=["y = moe(x).hidden   # the tokens"],
        )
    )


def _no_attribute(self: MoEOutput, name: str) -> NoReturn:
    if not name.startswith("__") and hasattr(Tensor, name):
        _refuse(f"`.{name}`")
    raise AttributeError(f"'MoEOutput' object has no attribute {name!r}")


def _no_operator(self: MoEOutput, symbol: str, *other: object) -> NoReturn:
    _refuse(f"`{symbol}`")


def _no_argument(
    cls: type, func: object, types: object, args: object = (), kwargs: object = None
) -> NoReturn:
    """For torch functions and modules that are given the record, and for `x + out`."""
    _refuse(f"torch's {getattr(func, '__name__', func)}")


_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "matmul": "@"}
_REFUSED = {f"__{side}{name}__": s for name, s in _OPERATORS.items() for side in ("", "r")}
_REFUSED |= {"__neg__": "-", "__getitem__": "[]"}
# Set from here, so that type checkers do not see them and find such uses before they run.
for _name, _symbol in _REFUSED.items():
    setattr(MoEOutput, _name, partialmethod(_no_operator, _symbol))
setattr(MoEOutput, "__getattr__", _no_attribute)  # noqa: B010  # as above
setattr(MoEOutput, "__torch_function__", classmethod(_no_argument))  # noqa: B010  # as above
