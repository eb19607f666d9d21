"""Walk over a value and its annotation: every tensor that has a declared placement, with its path.

Tuples, lists and mappings are read by the annotation, which may be a union; dataclasses and named
tuples by the annotations of their own fields.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeVar, cast

from torch import Tensor

from spmd_moe.core.placement import Placement, annotations_of, placement_of


class DeclaredTensor(NamedTuple):
    """A tensor, where it is in an argument or result, and the placement declared for it."""

    path: str  # such as `result[1].scores`
    tensor: Tensor
    placement: Placement


def declared_tensors(
    value: Any, hint: Any, path: str, above: tuple[int, ...] = ()
) -> Iterator[DeclaredTensor]:
    """Every tensor in `value` that its annotation `hint` places, in order.

    Args:
        value: An argument or a result.
        hint: Its annotation, as `annotations_of` returns it.
        path: The name of `value`; the path of what is inside begins with it.
        above: Ids of the containers that hold `value`; a cycle ends at them.
    """
    if isinstance(value, Tensor):
        placement = _placement(hint)
        if placement is not None:
            yield DeclaredTensor(path, value, placement)
    elif id(value) not in above:
        for step, item, of_item in _items(value, hint):
            yield from declared_tensors(item, of_item, path + step, (*above, id(value)))


def placements_in(hint: Any, above: tuple[Any, ...] = ()) -> Iterator[Placement]:
    """Every placement in an annotation, its parts, and the fields of records that it names."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Annotated:
            yield cast(Placement, placement_of(kind))
            continue
        record = typing.get_origin(kind) or kind
        parts = list(typing.get_args(kind))
        if record not in above and (_is_record(record) or typing.is_typeddict(record)):
            parts += _fields(record).values()
        for part in parts:
            yield from placements_in(part, (*above, record))


# --- annotations ------------------------------------------------------------------------------

_UNIONS = (typing.Union, types.UnionType, typing.Required, typing.NotRequired)


def _alternatives(hint: Any) -> Iterator[Any]:
    """The members of a union, flat; of any other annotation, itself."""
    origin = typing.get_origin(hint)
    if origin in _UNIONS:
        for member in typing.get_args(hint):
            yield from _alternatives(member)
    elif origin is Annotated and placement_of(hint) is None:
        yield from _alternatives(typing.get_args(hint)[0])
    else:
        yield hint


def _placement(hint: Any) -> Placement | None:
    placed = (kind for kind in _alternatives(hint) if typing.get_origin(kind) is Annotated)
    return next(map(placement_of, placed), None)


def _is_record(kind: Any) -> bool:
    """Whether a class is a dataclass or a named tuple."""
    is_named_tuple = _is_class(kind, tuple) and hasattr(kind, "_fields")
    return is_named_tuple or (isinstance(kind, type) and is_dataclass(kind))


@lru_cache(maxsize=1024)
def _fields(record: Any) -> dict[str, Any]:
    return annotations_of(record)[0]


# --- containers -------------------------------------------------------------------------------


_PLAIN = (int, float, str, bytes, type(None))


def _items(value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a container holds: the step of the path to an item, the item, its annotation."""
    kinds, record = list(_alternatives(hint)), cast(Hashable, type(value))
    if _is_record(record):
        inner = next((typing.get_args(k) for k in kinds if typing.get_origin(k) is record), ())
        known = dict(zip(getattr(record, "__parameters__", ()), inner, strict=False))
        for name, of_field in _fields(record).items():
            yield f".{name}", _field(value, name), _specialized(of_field, known)
    elif isinstance(value, Mapping | tuple | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, _PLAIN):  # there may be many
                continue
            of_item = (_of_item(kind, key, value) for kind in kinds)
            yield f"[{key!r}]", item, next((h for h in of_item if h is not None), None)


def _field(record: Any, name: str) -> Any:
    """A field of a record, or None before it is set. Never a call of the record's `__getattr__`."""
    try:
        return object.__getattribute__(record, name)
    except AttributeError:
        return None


def _specialized(hint: Any, known: Mapping[Any, Any]) -> Any:
    """The annotation of a field in a generic record, with what stands for its type variables."""
    if isinstance(hint, TypeVar):
        return known.get(hint)
    variables = getattr(hint, "__parameters__", ())
    return hint[tuple(known.get(v, v) for v in variables)] if known and variables else hint


def _of_item(kind: Any, key: Any, value: Any) -> Any:
    """The annotation of an item, if `kind` is the annotation of a container like `value`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, Mapping):
        if typing.is_typeddict(kind):
            return _fields(kind).get(key)
        return inner[-1] if inner and _is_class(origin, Mapping) else None
    if not inner or not _is_class(origin, Iterable) or _is_class(origin, Mapping):
        return None
    if origin is tuple and ... not in inner:
        return inner[key] if len(inner) == len(value) else None
    return inner[0]


def _is_class(kind: Any, parent: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, parent)
