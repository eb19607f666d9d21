"""Calls of values, overloads, operators and stars: every callee takes what it declares."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, ParamSpec, Protocol, TypedDict, TypeVar, overload

from torch import Tensor

from spmd_moe.core.placement import Tokens, TokenSums, Whole

T = TypeVar("T", bound=Tensor)
Q = ParamSpec("Q")


class Fn(Protocol):
    def __call__(self, x: Tokens) -> Tokens: ...


class Many(Protocol):
    def __call__(self, x: Tokens, *more: Tokens, **named: Whole) -> Tokens: ...


class HasGo(Protocol):
    x: Tokens

    def go(self, x: Tokens) -> Whole: ...


class Goes:
    x: Tokens

    def go(self, x: Tokens) -> Whole:
        raise NotImplementedError


class OtherGo:
    x: Tokens

    def go(self, x: Whole) -> Whole:
        return x


class OtherX(Goes):
    x: Whole  # E: placement-override


class Holds:
    x: Whole

    def go(self, x: Tokens) -> Whole:
        return self.x


class Calls:
    def __call__(self, x: Tokens, *, w: Whole | None = None) -> Tokens:
        return x


def good(x: Tokens, *more: Tokens, w: Whole | None = None) -> Tokens:
    return x


def bad(x: Whole) -> Tokens:
    raise NotImplementedError


def many(x: Tokens, *more: Tokens, **named: Whole) -> Tokens:
    return x


def other_many(x: Tokens, *more: Whole, **named: Whole) -> Tokens:
    return x


def two(x: Tokens, w: Whole) -> Tokens:
    return x


def want(f: Callable[[Tokens], Tokens]) -> None: ...
def want_many(f: Many) -> None: ...
def want_fn(f: Fn) -> None: ...
def want_go(f: HasGo) -> None: ...


def functions(calls: Calls, fns: list[Fn], f: Callable[[Tokens], Tokens], w: Whole) -> None:
    want(good)
    want(calls)
    want(fns[0])
    want(lambda x: x)
    want(bad)  # E: placement-argument
    want_fn(good)
    want_fn(calls)
    want_fn(bad)  # E: placement-argument
    want_many(many)
    want_many(other_many)  # E: placement-argument
    want_go(Goes())
    want_go(OtherGo())  # E: placement-argument
    want_go(Holds())  # E: placement-argument
    _: Callable[[Tokens], Tokens] = bad  # E: placement-assignment
    by: dict[str, Fn] = {"a": good, "b": bad}  # E: placement-assignment
    by["a"](w)  # E: placement-argument
    fns[0](w)  # E: placement-argument
    f(w)  # E: placement-argument
    calls(w)  # E: placement-argument


def partials(x: Tokens, w: Whole) -> None:
    with_x, with_w = partial(two, x), partial(two, w=w)
    with_x(w)
    with_w(x)
    with_x(x)  # E: placement-argument
    with_w(w)  # E: placement-argument
    partial(two, w)  # E: placement-argument


@overload
def either(x: Tokens) -> Tokens: ...
@overload
def either(x: Tokens, y: Whole) -> Whole: ...
@overload
def either(x: int) -> int: ...
def either(x: Tokens | int, y: Whole | None = None) -> Tokens | Whole | int:
    return x if y is None else y


@overload
def by_placement(x: Tokens) -> Tokens: ...
@overload
def by_placement(x: Whole, y: int = 0) -> Whole: ...
def by_placement(x: Tokens | Whole, y: int = 0) -> Tokens | Whole:
    return x


def overloads(x: Tokens, w: Whole, sums: TokenSums, by: dict[str, Tokens]) -> None:
    either(x)
    either(x, w)
    either(1)
    either(w)  # E: placement-argument
    either(x, x)  # E: placement-argument
    by_placement(x)
    by_placement(w)
    by_placement(sums)  # E: placement-argument
    by_placement(x, 1)  # E: placement-argument
    by.update(a=x)
    by.update({"a": x}, b=x)
    by.update(a=w)  # E: placement-argument
    by.update({"a": w})  # E: placement-argument


class Both(TypedDict):
    x: Tokens
    w: Whole


class Swapped(TypedDict):
    w: Tokens
    x: Tokens


def stars(x: Tokens, w: Whole, pair: tuple[Tokens, Whole], all_x: list[Tokens]) -> None:
    both: Both = {"x": x, "w": w}
    swapped: Swapped = {"x": x, "w": x}
    two(*[x, w])
    two(*pair)
    two(**both)
    good(*all_x, x)
    two(*(x, x))  # E: placement-argument
    good(*pair)  # E: placement-argument
    two(*all_x)  # E: placement-argument
    two(**swapped)  # E: placement-argument
    two(x, **{"w": w})
    two(x, **{"w": x})  # E: placement-argument


class Base:
    w: Whole
    more: list[Tokens]
    f: Callable[[Tokens], Tokens]

    @property
    def p(self) -> Tokens:
        raise NotImplementedError


class Sub(Base):
    w: Tokens  # E: placement-override
    more: list[Whole]  # E: placement-override
    f: Callable[[Whole], Tokens]  # E: placement-override
    p: Whole  # E: placement-override


class Same(Base):
    w: Whole
    more: list[Tokens]
    p: Tokens


@dataclass
class Record:
    x: Tokens
    n: int | None = None


@dataclass
class SubRecord(Record):
    x: Whole  # E: placement-override
    n: int


class Named(NamedTuple):
    x: Tokens


class SubNamed(Named):
    @property
    def x(self) -> Whole:  # E: placement-override
        raise NotImplementedError


class Sums:
    def __add__(self, other: Tokens) -> Tokens:
        return other

    def __rsub__(self, other: int) -> Tokens:
        raise NotImplementedError

    def __contains__(self, other: Tokens) -> bool:
        return True

    def __getitem__(self, at: Tokens) -> Tokens:
        return at

    def __ior__(self, other: Tokens) -> Sums:
        return self


def operators(h: Sums, x: Tokens, w: Whole, xs: list[Tokens], flag: bool) -> None:
    print(h + x, x in h, h[x], 1 - h, flag and x in h)
    _ = h + w  # E: placement-argument
    _ = w in h  # E: placement-argument
    _ = h[w]  # E: placement-argument
    h |= x
    h |= w  # E: placement-argument
    xs += [x]
    xs += [w]  # E: placement-argument


@contextmanager
def held(x: Tokens) -> Iterator[Tokens]:
    yield x


@asynccontextmanager
async def held_later(w: Whole) -> AsyncIterator[Whole]:
    yield w


async def contexts(x: Tokens, w: Whole) -> None:
    with held(w) as y:  # E: placement-argument
        good(y)
        bad(y)  # E: placement-argument
    async with held_later(w) as z:
        good(z)  # E: placement-argument
        bad(z)


def logged(f: Callable[Q, T]) -> Callable[Q, T]:
    return f


def first(xs: Sequence[T], *more: T) -> tuple[T, int]:
    return xs[0], len(xs)


@logged
def measured(x: Tokens, w: Whole) -> Tokens:
    return x


def generic_functions(x: Tokens, w: Whole) -> Whole:
    good(measured(x, w))
    good(first([x, x])[0])
    good(first([x], w)[0])
    bad(first([x, x])[0])  # E: placement-argument
    measured(w, w)  # E: placement-argument
    return measured(x, w)  # E: placement-return


def chosen(x: Tokens, w: Whole, maybe: Whole | None, plain: Tensor | None) -> Whole:
    y = x if x is not None else maybe  # type: ignore[redundant-expr]
    good(y)
    good(x or plain or x)
    good(x or w)  # E: placement-argument
    if (x > 0).any() or (w > 0).any():
        good(y)
    return maybe or w
