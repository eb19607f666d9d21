"""Annotated functions of a program, and the declared tensors of a call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import BoundArguments, Parameter, Signature
from types import FunctionType, GenericAlias, ModuleType
from typing import Any, final

import torch
from torch import nn

from spmd_moe.core.placement import Placement, annotations_of
from spmd_moe.signatures.declared_tensors import DeclaredTensor, declared_tensors, placements_in

_NOT_THE_PROGRAM = {"torch", "spmd_types", *sys.stdlib_module_names}
_CHECKERS = tuple(f"spmd_moe.{f}" for f in ("signatures", "sanitize", "check", "static"))


@final
@dataclass(frozen=True, slots=True, eq=False)
class AnnotatedFunction:
    """A function with placements in its signature."""

    function: FunctionType
    original: FunctionType  # with the same code; callable while `function` is intercepted
    signature: Signature
    hints: Mapping[str, Any]
    unreadable: Mapping[str, str]  # annotations as written, with names that do not exist

    @property
    def name(self) -> str:
        return self.function.__qualname__

    def placements(self) -> Iterator[Placement]:
        for hint in self.hints.values():
            yield from placements_in(hint)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
        try:
            return self.signature.bind(*args, **kwargs)
        except TypeError:  # the function raises it, or a decorator has changed its arguments
            return _ANY.bind(*args, **kwargs)

    def arguments(self, bound: BoundArguments) -> Iterator[DeclaredTensor]:
        for name, value in bound.arguments.items():
            yield from self.argument(name, value)

    def argument(self, name: str, value: Any) -> Iterator[DeclaredTensor]:
        yield from declared_tensors(value, self.hints.get(name), f"argument {name}")

    def result(self, value: Any) -> Iterator[DeclaredTensor]:
        yield from declared_tensors(value, self.hints.get("return"), "result")


# --- finding ----------------------------------------------------------------------------------


def packages_of(model: nn.Module) -> set[str]:
    """The top-level packages, or programs, that define a model's classes and their bases."""
    # FSDP gives each module a class of its own, below the user's.
    classes = {cls for part in model.modules() for cls in type(part).__mro__}
    return {cls.__module__.partition(".")[0] for cls in classes} - _NOT_THE_PROGRAM


def annotated_functions(packages: Iterable[str]) -> Iterator[AnnotatedFunction]:
    """Every function and method with a placement in its signature, or with an annotation that
    cannot be read, in the loaded modules of these packages."""
    chosen, known = set(packages), set[int]()
    for name, module in sorted(sys.modules.items()):
        is_chosen = name.partition(".")[0] in chosen and not name.startswith(_CHECKERS)
        if not is_chosen or not isinstance(module, ModuleType):
            continue
        for function in _functions_of(module):
            if id(function) not in known:
                known.add(id(function))
                found = _annotated(function)
                if found is not None:
                    yield found


def _functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """Functions that a module defines, also in its classes and the classes in those."""
    owners: list[Any] = [module]
    for owner in owners:  # grows
        for value in list(vars(owner).values()):
            if isinstance(value, type) and value not in owners:
                owners += [value] if value.__module__ == module.__name__ else []
            is_method = isinstance(value, staticmethod | classmethod)
            function = value.__func__ if is_method else value
            function = value.fget if isinstance(value, property) else function
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function


def _annotated(function: FunctionType) -> AnnotatedFunction | None:
    if not function.__annotations__:
        return None
    hints, unreadable = annotations_of(function)
    if not unreadable and not any(any(placements_in(hint)) for hint in hints.values()):
        return None
    original = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    original.__kwdefaults__ = function.__kwdefaults__
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        hint = hints.get(parameter.name)
        if parameter.kind is Parameter.VAR_POSITIONAL and hint is not None:
            hints[parameter.name] = GenericAlias(tuple, (hint, ...))
        if parameter.kind is Parameter.VAR_KEYWORD and hint is not None:
            hints[parameter.name] = GenericAlias(dict, (str, hint))
    return AnnotatedFunction(function, original, signature, hints, unreadable)


# --- calls ------------------------------------------------------------------------------------

# What runs in place of a call; it calls `function.original(*bound.args, **bound.kwargs)`.
Handler = Callable[[AnnotatedFunction, BoundArguments], Any]

INTERCEPTED: dict[str, tuple[AnnotatedFunction, Handler]] = {}
"""The functions that are intercepted at this moment, by a key of their own."""


def call_intercepted(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    each, handler = INTERCEPTED[key]
    if torch.compiler.is_compiling():
        return each.original(*args, **kwargs)
    return handler(each, each.bind(args, kwargs))


_ANY = inspect.signature(lambda *args, **kwargs: None)
