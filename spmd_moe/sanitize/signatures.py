"""What signatures say: annotated functions of a program, and the tensors in their arguments."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, cast, final

import torch
from torch import Tensor, nn

from spmd_moe.core.errors import users_line
from spmd_moe.core.placement import Placement, annotations_of, placement_of

# What an observer is told: the function, the name of the tensor, the tensor itself, the placement
# declared for it, the user's line.
Observer = Callable[[str, str, Tensor, Placement, str], None]
Declared = tuple[str, Tensor, Placement]
_NOT_WATCHED = ("torch", "spmd_types", "builtins", "typing")
_OURS = __name__.rpartition(".")[0]


@final
@dataclass(frozen=True, slots=True)
class Watched:
    """One annotated function: how to run it, and what its signature says."""

    function: types.FunctionType
    original: Callable[..., Any]
    code: types.CodeType
    name: str
    hints: Mapping[str, Any]

    def tensors(self, names: Iterable[str], values: Iterable[Any]) -> Iterator[Declared]:
        for name, value in zip(names, values, strict=False):
            if name in self.hints:
                spoken = "result" if name == "return" else f"'{name}'"
                yield from declared_tensors(value, self.hints[name], spoken)


OPEN: dict[str, tuple[Watched, Observer]] = {}
"""The functions that are watched at this moment."""


def pass_through(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the function whose code was taken away, and show what goes in and what comes out."""
    watched, observer = OPEN[key]
    if torch.compiler.is_compiling():
        return watched.original(*args, **kwargs)
    line = users_line(sys._getframe(2))
    positional = watched.code.co_varnames[: watched.code.co_argcount]
    for seen in watched.tensors((*positional[: len(args)], *kwargs), (*args, *kwargs.values())):
        observer(watched.name, *seen, line)
    result = watched.original(*args, **kwargs)
    for seen in watched.tensors(("return",), (result,)):
        observer(watched.name, *seen, line)
    return result


# --- finding functions ------------------------------------------------------------------------


def modules_of(model: nn.Module) -> list[types.ModuleType]:
    """Loaded modules of the packages, or the program, that the model's classes come from."""
    # FSDP gives every module a class of its own, below the user's.
    classes = {cls for part in model.modules() for cls in type(part).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    packages -= set(_NOT_WATCHED)
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in packages
        and not name.startswith(_OURS)
        and isinstance(module, types.ModuleType)
    ]


def annotated(
    modules: Iterable[types.ModuleType],
) -> Iterator[tuple[types.FunctionType, dict[str, Any]]]:
    """Every function and method with a placement in its signature, and its annotations."""
    known: set[int] = set()
    for module in modules:
        classes = (v for v in list(vars(module).values()) if isinstance(v, type))
        owners = [module, *(c for c in classes if c.__module__ == module.__name__)]
        for owner in owners:
            for value in list(vars(owner).values()):
                function = getattr(value, "__func__", value)  # of static and class methods
                if not isinstance(function, types.FunctionType) or id(function) in known:
                    continue
                known.add(id(function))
                if function.__module__ == module.__name__ and function.__annotations__:
                    hints = _hints(function)
                    if any(any(placements_in(hint)) for hint in hints.values()):
                        yield function, hints


def watched(function: types.FunctionType, hints: dict[str, Any]) -> Watched:
    code = function.__code__
    original = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    return Watched(function, original, code, function.__qualname__, hints)


def _hints(annotated_object: Any) -> dict[str, Any]:
    return annotations_of(annotated_object)[0]


# --- finding tensors --------------------------------------------------------------------------


def declared_tensors(value: Any, hint: Any, name: str) -> Iterator[Declared]:
    """The tensors in a value that its annotation gives a placement, however deep, with names."""
    if isinstance(value, Tensor):
        placement = placement_of(hint)
        if placement is not None:
            yield name, value, placement
    elif fields := _fields(cast(Hashable, type(value))):
        for field, of_field in fields:
            yield from declared_tensors(getattr(value, field), of_field, f"{name}.{field}")
    elif isinstance(value, tuple | list):
        for i, (item, of_item) in enumerate(zip(value, _items(hint, len(value)), strict=True)):
            yield from declared_tensors(item, of_item, f"{name}[{i}]")


@lru_cache(maxsize=1024)
def _fields(record: Any) -> tuple[tuple[str, Any], ...]:
    """Fields of a dataclass or of a named tuple that have a placement somewhere."""
    if not is_dataclass(record) and not hasattr(record, "_fields"):
        return ()
    return tuple((n, h) for n, h in _hints(record).items() if any(placements_in(h)))


def _items(hint: Any, count: int) -> Sequence[Any]:
    """An annotation for each item of a tuple or a list."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and ... not in inner and len(inner) == count:
        return inner
    if origin in (tuple, list, Sequence) and inner:
        return [inner[0]] * count
    for member in inner:  # of a union
        if typing.get_origin(member) in (tuple, list, Sequence):
            return _items(member, count)
    return [None] * count


def placements_in(hint: Any, above: tuple[Any, ...] = ()) -> Iterator[Placement]:
    """Placements in an annotation, in its parts, and in the fields of records that it names."""
    if hint in above:  # a record that holds others of its kind
        return
    if typing.get_origin(hint) is Annotated:
        placement = placement_of(hint)
        if placement is not None:
            yield placement
    elif isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields")):
        for inner in _hints(hint).values():
            yield from placements_in(inner, (*above, hint))
    else:
        for inner in typing.get_args(hint):
            yield from placements_in(inner, above)
