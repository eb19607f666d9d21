"""Annotated functions of a program: which are found, and what runs while they are intercepted."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from inspect import BoundArguments
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from spmd_moe import TP, Placed, R
from spmd_moe.core.errors import users_line
from spmd_moe.layer import permute
from spmd_moe.layer.dispatch import all_to_all
from spmd_moe.signatures.annotated_functions import (
    AnnotatedFunction,
    annotated_functions,
    packages_of,
)
from spmd_moe.signatures.interception import intercepted

Same = Placed[Tensor, TP[R]]
F = TypeVar("F", bound=Callable[..., Any])
one = torch.ones(1)


def decorated(function: F) -> F:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]  # it takes and returns the same


class Model(nn.Module):
    def forward(self, x: Same, *more: Same, scale: float = 2.0, **named: Same) -> Same:
        return x * scale

    @staticmethod
    def static(x: Same) -> Tensor:
        return x

    @classmethod
    def of_class(cls, x: Same) -> type[Model]:
        return cls

    @property
    def value(self) -> Same:
        return one

    @decorated
    def wrapped(self, x: Same) -> Tensor:
        return x

    def plain(self, x: Tensor) -> Tensor:
        return x

    class Inner:
        def method(self) -> Same:
            return one


def outer() -> Callable[[Same], Tensor]:
    offset = 1

    def closure(x: Same) -> Tensor:
        return x + offset

    return closure


closure = outer()


def unreadable(x: NotThere, y: Same) -> None:  # type: ignore[name-defined]  # noqa: F821
    pass


# What no annotation means: evaluating it raises other errors.
unreadable.__annotations__ |= {"a": "no expression", "b": "1 / 0", "c": "{}['key']"}


def where() -> str:
    return users_line()


def raises(x: Same) -> Any:
    return where()


FOUND = {
    *("Model.forward", "Model.static", "Model.of_class", "Model.value", "Model.wrapped"),
    *("Model.Inner.method", "outer.<locals>.closure", "unreadable", "raises"),
}


def own_functions() -> list[AnnotatedFunction]:
    found = annotated_functions([__name__.partition(".")[0]])
    return [each for each in found if each.function.__module__ == __name__]


def test_which_functions_are_found() -> None:
    found = {each.name: each for each in own_functions()}
    assert found.keys() == FOUND
    unread = {"x": "NotThere", "a": "no expression", "b": "1 / 0", "c": "{}['key']"}
    assert found["unreadable"].unreadable == unread
    assert [str(p) for p in found["unreadable"].placements()] == ["tp:R"]
    assert packages_of(Model()) == {"tests"}


def test_a_function_is_found_once_also_where_an_earlier_module_imports_it() -> None:
    assert all_to_all.__name__ < permute.__name__
    assert vars(all_to_all)["expert_major"] is permute.expert_major
    names = [each.name for each in annotated_functions(["spmd_moe"])]
    assert names.count("expert_major") == 1


def test_every_reference_is_intercepted_and_restored() -> None:
    kept, method, codes = Model.static, Model().forward, {}
    paths: list[str] = []

    def handler(each: AnnotatedFunction, bound: BoundArguments) -> Any:
        paths.extend(f"{each.name} {path}" for path, _, _ in each.arguments(bound))
        result = each.original(*bound.args, **bound.kwargs)
        paths.extend(f"{each.name} {path}" for path, _, _ in each.result(result))
        return result

    functions = own_functions()
    codes = {each.name: each.function.__code__ for each in functions}
    signature = inspect.signature(Model.forward)
    with intercepted(functions, handler):
        assert inspect.signature(Model.forward) == signature
        assert kept(one) is one
        assert torch.equal(method(one, one, scale=3.0, y=one), one * 3)
        assert Model.of_class(one) is Model
        assert Model().value is one and Model.Inner().method() is one
        assert Model().wrapped(one) is one
        assert torch.equal(closure(one), one + 1)
        with pytest.raises(TypeError, match=r"forward\(\) missing 1 required positional argument"):
            method()  # type: ignore[call-arg]  # on purpose
    forward = [f"Model.forward {p}" for p in ("argument x", "argument more[0]")]
    forward += ["Model.forward argument named['y']", "Model.forward result"]
    assert paths == [
        *["Model.static argument x", *forward, "Model.of_class argument x", "Model.value result"],
        *["Model.Inner.method result", "Model.wrapped argument x"],
        "outer.<locals>.closure argument x",
    ]
    assert {each.name: each.function.__code__ for each in functions} == codes
    assert not any("__signature__" in vars(each.function) for each in functions)


def test_two_at_once_end_in_order() -> None:
    ran: list[int] = []

    def handler(number: int, each: AnnotatedFunction, bound: BoundArguments) -> Any:
        ran.append(number)
        return each.original(*bound.args, **bound.kwargs)

    code = Model.static.__code__
    with intercepted(own_functions(), functools.partial(handler, 1)):
        with intercepted(own_functions(), functools.partial(handler, 2)):
            Model.static(one)
        Model.static(one)
    Model.static(one)
    assert ran == [2, 1, 1] and Model.static.__code__ is code
    assert "__signature__" not in vars(Model.static)


def test_the_line_of_the_user_is_in_his_program() -> None:
    """A trampoline has the globals of a function of his, but its line is in a file of ours."""

    def handler(each: AnnotatedFunction, bound: BoundArguments) -> Any:
        return each.original(*bound.args, **bound.kwargs), users_line(sys._getframe(1))

    with intercepted(own_functions(), handler):
        inside, around = raises(one)
        line = sys._getframe().f_lineno - 1
    assert inside.startswith("tests/signatures/test_annotated_functions.py:")
    assert around == f"tests/signatures/test_annotated_functions.py:{line}"
