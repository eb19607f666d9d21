"""Arguments, results, assignments and branches against what is declared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypedDict, TypeVar, final, overload

import torch
from torch import Tensor, nn

from spmd_moe import TP, I, MoEMesh, P, Placed, R, S, V, redistribute
from spmd_moe.core.placement import (
    AllTokens,
    GatheredRows,
    RouterWeight,
    Rows,
    Tokens,
    TokenSums,
    Whole,
)

T = TypeVar("T", bound=Tensor)
Layer = Callable[[Tokens], Tokens]


def take(x: Tokens, *rest: Tokens, w: Whole | None = None, **named: TokenSums) -> Tokens:
    return x


def arguments(x: Tokens, w: Whole, sums: TokenSums, rows: Rows, plain: Tensor) -> None:
    take(x, x, w=w, y=sums)
    take(x, w=None)
    take(plain)
    take(rows)
    take(w)  # E: placement-argument
    take(x=sums)  # E: placement-argument
    take(x, x, w)  # E: placement-argument
    take(x, w=x)  # E: placement-argument
    take(x, y=x)  # E: placement-argument
    take(x if rows.numel() else w)  # E: placement-argument, placement-branch


def one_of_two(x: Tokens, w: Whole, sums: TokenSums, either: Tokens | Whole) -> Tokens | Whole:
    if x.numel():
        return either
    if w.numel():
        return w
    take(either)  # E: placement-argument
    _: Tokens | Tensor = w
    return sums  # E: placement-return


@overload
def of_two(x: Tokens) -> Tokens: ...
@overload
def of_two(x: Tokens, w: Whole) -> Whole: ...
def of_two(x: Tokens, w: Whole | None = None) -> Tokens | Whole:
    take(w or x)  # E: placement-argument
    if w is None:
        return x
    take(w)  # E: placement-argument
    return w


def both_meshes(rows: Rows, gathered: GatheredRows, everyone: AllTokens, x: Tokens) -> Rows:
    take(gathered)  # E: placement-argument
    take(everyone)  # E: placement-argument
    return x


def results(x: Tokens, w: Whole, early: bool) -> tuple[Whole, Tokens | None]:
    if early:
        return w, None
    if x.numel():
        return x, x  # E: placement-return
    return w, w  # E: placement-return


def yielded(x: Tokens, w: Whole) -> Iterator[Tokens]:
    yield x
    yield w  # E: placement-return


async def awaited(x: Tokens, w: Whole) -> Whole:
    return x  # E: placement-return


async def awaits(x: Tokens, w: Whole) -> Tokens:
    return await awaited(x, w)  # E: placement-return


def assignments(x: Tokens, w: Whole) -> None:
    y: Tokens = x
    y = w  # E: placement-assignment
    a: Whole
    a, _ = w, x
    a, _ = x, w  # E: placement-assignment
    for each in (x, x):
        take(each)
    print(y, a)


def narrowed(x: Tokens, w: Whole, mesh: MoEMesh) -> Whole:
    h = x * 2
    h = redistribute(h, mesh[TP], src=S(0), dst=R)
    take(h)  # E: placement-argument
    x = h  # E: placement-assignment
    if (z := w + w).numel():
        take(z)  # E: placement-argument
    return w


def branches(x: Tokens, w: Whole, early: bool) -> None:
    y = x
    if early:
        y = w  # E: placement-branch
    print(y)


def defaults(w: Whole, x: Tokens | None = None) -> Tokens:
    return w if x is None else x  # E: placement-return, placement-branch


@final
@dataclass
class Record:
    x: Tokens
    sums: TokenSums | None = None


class Pair(NamedTuple):
    x: Tokens
    w: Whole


def records(x: Tokens, w: Whole, sums: TokenSums) -> Whole:
    record = Record(x, sums)
    _ = Record(w)  # E: placement-argument
    _ = Record(x, sums=x)  # E: placement-argument
    record.x = w  # E: placement-assignment
    pair = Pair(x, w)
    one, other = pair
    _ = Pair(x=w, w=w)  # E: placement-argument
    take(one)
    take(other)  # E: placement-argument
    take(pair[0])
    take(pair.w)  # E: placement-argument
    return record.x  # E: placement-return


class Gate(nn.Module):
    weight_ED: RouterWeight
    bias_E: Placed[Tensor, TP[R]]

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.tp = mesh[TP]

    def forward(self, x_TD: Tokens) -> Tokens:
        _ = x_TD @ self.weight_ED.T  # E: placement-operation
        weight_ED = redistribute(self.weight_ED, self.tp, src=I, dst=R)
        self.bias_E = weight_ED.sum(1)
        self.bias_E = x_TD  # E: placement-assignment
        return x_TD @ weight_ED.T + self.bias_E


class Twice(Gate):
    def forward(self, x_TD: Tokens) -> Whole:  # E: placement-override
        return super().forward(x_TD)  # E: placement-return


class Shelf(TypedDict, total=False):
    x: Tokens
    w: Whole


class Kept(nn.Module):
    @property
    def kept(self) -> Tokens:
        return self.forward(self.kept)

    @kept.setter
    def kept(self, x: Tokens) -> None: ...

    @abstractmethod
    def forget(self, x: Tokens) -> Whole: ...

    @torch.no_grad()
    def forward(self, x_TD: Tokens) -> Tokens:
        return x_TD

    def __setitem__(self, index: int, x: Tokens) -> None: ...


class KeptWhole(Kept):
    @property
    def kept(self) -> Whole:  # E: placement-override
        raise NotImplementedError

    @kept.setter
    def kept(self, x: Whole) -> None: ...

    @final
    def forget(self, x: Tokens) -> Tokens:  # E: placement-override
        return x

    @torch.no_grad()
    def forward(self, x_TD: Whole) -> Tokens:  # E: placement-override
        raise NotImplementedError


def places(kept: Kept, x: Tokens, w: Whole, xs: list[Tokens], by: dict[str, Tokens]) -> Shelf:
    kept.kept = x
    kept.kept = w  # E: placement-assignment
    kept(w)  # E: placement-argument
    kept[0] = x
    kept[0] = w  # E: placement-assignment
    xs[0], by["x"] = x, x
    xs[0], by["w"] = x, w  # E: placement-assignment
    xs[0] = w  # E: placement-assignment
    xs[:] = [x]
    xs[:] = [w]  # E: placement-assignment
    by = {"x": x, **{"y": x}}
    by = {"x": x, **{"y": w}}  # E: placement-assignment
    shelf: Shelf = {"x": x, "w": w}
    shelf["x"] = w  # E: placement-assignment
    return {"x": w, "w": w}  # E: placement-return


def generated(x: Tokens, w: Whole) -> Generator[Tokens, Whole, Whole]:
    yield x
    if w.numel():
        return w
    return x  # E: placement-return


def module_in_a_function(x: Tokens, w: Whole) -> None:
    class Local(nn.Module):
        def forward(self, x_TD: Tokens) -> Tokens:
            return x_TD

    layer = Local()
    layer(x)
    layer(w)  # E: placement-argument


def modules(gate: Gate, x: Tokens, w: Whole, more: nn.ModuleList) -> Whole:
    y = gate(x)
    gate(w)  # E: placement-argument
    gate.forward(w)  # E: placement-argument
    return y  # E: placement-return


def same(x: T) -> T:
    return x


class Box(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value


def generics(x: Tokens, w: Whole, layer: Layer) -> Whole:
    take(same(x))
    take(same(w))  # E: placement-argument
    box = Box(w)
    take(box.value)  # E: placement-argument
    layer(w)  # E: placement-argument
    return layer(x)  # E: placement-return


class Stage(Protocol):
    def run(self, x: Tokens) -> Whole: ...


def protocols(stage: Stage, w: Whole) -> Tokens:
    return stage.run(w)  # E: placement-argument, placement-return


def dims(x: Placed[Tensor, TP[S[0]]], y: Placed[Tensor, TP[S[1]]]) -> Placed[Tensor, TP[S[0]]]:
    v: Placed[Tensor, TP[V]] = x
    x = v
    p: Placed[Tensor, TP[P]] = y  # E: placement-assignment
    print(p)
    return y  # E: placement-return
