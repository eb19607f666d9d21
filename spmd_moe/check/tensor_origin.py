"""Lineage of a tensor: numbers alone, inputs of the module, or factories (`torch.zeros`).

A factory (`torch.zeros(n)`, `torch.tensor(rank)`) makes the same kind on all ranks, for any
numbers. If two ranks pass different numbers, the results differ between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from spmd_moe.check.follow_sharded_dims import is_given

_ATTRIBUTE = "_spmd_moe_lineage"


@final
@dataclass(frozen=True, slots=True)
class Lineage:
    factories: frozenset[Any] = frozenset()  # whose results went into it; a place in the program
    pure: bool = False  # nothing else went into it
    fed: bool = False  # something that the module was given did
    moved: bool = False  # something that came out of a collective did


_NONE, _FED = Lineage(), Lineage(fed=True)


def lineage(x: Tensor) -> Lineage:
    found: Lineage | None = vars(x).get(_ATTRIBUTE)
    return found or (_FED if is_given(x) else _NONE)


def descend(
    operands: Sequence[Lineage], results: Iterable[Tensor], place: object, moves: bool
) -> None:
    """Say of the results of an operation what they were made of; without operands, a factory's."""
    if not operands:
        made = Lineage(frozenset([place]), pure=True)
    else:
        pure = all(x.pure for x in operands)
        # Once it has met something else, it is as alike or not as the types there say.
        factories = [x.factories for x in operands] if pure else []
        fed, moved = any(x.fed for x in operands), moves or any(x.moved for x in operands)
        made = Lineage(frozenset().union(*factories), pure, fed, moved)
    for x in results if made != _NONE else ():
        setattr(x, _ATTRIBUTE, made)
