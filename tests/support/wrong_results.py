"""Functions whose result varies over tp and is declared R there, one for each kind of container."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypedDict, cast

import torch
from torch import Tensor, nn

from spmd_moe import CP, DP, TP, MoEMesh, Placed, R, ShardShape, V
from spmd_moe.check import Case

Own: TypeAlias = Placed[Tensor, DP[V], CP[V], TP[V]]
Same: TypeAlias = Placed[Tensor, DP[V], CP[V], TP[R]]


class Pair(NamedTuple):
    number: int
    scores: Same


@dataclass
class Record:
    scores: Same


class Keyed(TypedDict):
    scores: Same


def as_tensor(x: Own) -> Same:
    return x * 2


def as_list(x: Own) -> list[Same]:
    return [x * 2]


def as_tuple(x: Own) -> tuple[int, Same]:
    return 1, x * 2


def as_any_tuple(x: Own) -> tuple[Same, ...]:
    return (x * 2,)


def as_named_tuple(x: Own) -> Pair:
    return Pair(1, x * 2)


def as_dict(x: Own) -> dict[str, Same]:
    return {"scores": x * 2}


def as_record(x: Own) -> Record:
    return Record(x * 2)


def as_mapping(x: Own) -> Mapping[str, Same] | None:
    return {"scores": x * 2}


def as_typed_dict(x: Own) -> Keyed:
    return {"scores": x * 2}


def as_nested(x: Own) -> dict[str, list[Pair | None]]:
    return {"all": [None, Pair(1, x * 2)]}


def as_argument(x: Own) -> Own:
    return take(1, x, y=[x])


def take(*sizes: int | Own, **others: list[Same]) -> Own:
    return cast(Tensor, sizes[1]) + others["y"][0]


# Each with the function that is reported, and the path of the tensor.
WRONG: dict[Callable[[Any], Any], tuple[str, str]] = {
    as_tensor: ("as_tensor", "result"),
    as_list: ("as_list", "result[0]"),
    as_tuple: ("as_tuple", "result[1]"),
    as_any_tuple: ("as_any_tuple", "result[0]"),
    as_named_tuple: ("as_named_tuple", "result.scores"),
    as_dict: ("as_dict", "result['scores']"),
    as_record: ("Record.__init__", "argument scores"),
    as_mapping: ("as_mapping", "result['scores']"),
    as_typed_dict: ("as_typed_dict", "result['scores']"),
    as_nested: ("as_nested", "result['all'][1].scores"),
    as_argument: ("take", "argument others['y'][0]"),
}


class Model(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Own) -> Tensor:
        self.function(x)
        return x


def target_of(function: Callable[[Any], Any]) -> Callable[[MoEMesh, int], Case]:
    """A target for the traced check."""

    def target(mesh: MoEMesh, tokens: int) -> Case:
        tp = mesh[TP]
        x = torch.randn(ShardShape.even(tokens, tp.size).sizes[tp.rank], 8)
        return Case(Model(function), (x,), (Own,))

    return target
