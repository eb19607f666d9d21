"""Is a setting what it has to be? The checks that constructors share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from spmd_moe.core.errors import ConfigError, explain

PathLike: TypeAlias = str | os.PathLike[str]


def is_positive_int(value: object) -> bool:
    """An integer of 1 or more. True and 2.0 are refused: another setting, or a division."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_positive_ints(where: str, **given: object) -> None:
    for name, value in given.items():
        if not is_positive_int(value):
            raise ConfigError(
                explain(
                    where,
                    f"{name} is {value!r}; it must be an integer of 1 or more",
                    why="it is a size, or a number of something",
                    fixes=[f"{name}={_nearest(value)}"],
                )
            )


def check_number(
    where: str,
    name: str,
    value: object,
    fits: Callable[[float], bool],
    *,
    need: str,
    why: str,
    fix: str,
) -> None:
    """A number that fits, and that a float can hold: no text, and not NaN."""
    number = math.nan  # with which every comparison is False
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            value = number = math.inf  # an int of more than 308 digits
    if not fits(number):
        what = f"{name} is {value!r}; it must be {need}"
        raise ConfigError(explain(where, what, why=why, fixes=[fix]))


class Ranks(Protocol):
    """Several ranks, of an axis or of all; how they are called is their text."""

    @property
    def size(self) -> int: ...


def split_evenly(where: str, what: str, total: int, ranks: Ranks) -> int:
    """What one rank has of `total`, of which all have the same."""
    if total % ranks.size == 0:
        return total // ranks.size
    nearest = max(round(total / ranks.size), 1) * ranks.size
    raise ConfigError(
        explain(
            where,
            f"{what}={total} cannot be split over {ranks}",
            why="every rank has the same share",
            fixes=[f"{what}={nearest}   # the nearest that can"],
        )
    )


def check_one_of(
    where: str, name: str, value: object, known: Iterable[object], why: str = ""
) -> None:
    names = list(known)
    if value not in names:
        raise ConfigError(
            explain(
                where,
                f"{name} is {value!r}",
                why=why or f"it is one of {', '.join(map(repr, names))}",
                fixes=[f"{name}={names[0]!r}"],
            )
        )


def check_instance(
    where: str, name: str, value: object, wanted: type, fix: str, why: str = ""
) -> None:
    """An object of the class `wanted`, not that class itself and not another thing."""
    if not isinstance(value, wanted):
        raise ConfigError(
            explain(
                where,
                f"{name} is {describe_value(value)}; it must be {_article(wanted.__name__)}",
                why=why or f"it is read as {_article(wanted.__name__)}",
                fixes=[fix],
            )
        )


def check_path(where: str, name: str, value: object) -> Path:
    """A path, from a text or an object that is one."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(
            explain(
                where,
                f"{name} is {describe_value(value)}; it must be a str or a Path",
                why="files are read and written there",
                fixes=[f'{name}="checkpoints/000100"'],
            )
        )
    return Path(value)


def settings_of(config: Any) -> dict[str, object]:
    """The settings of a config by name, as ranks tell them to each other."""
    found: dict[str, object] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("router", "shared") and value is not None:
            found |= {f"{field.name}.{name}": own for name, own in settings_of(value).items()}
        else:
            found[field.name] = getattr(value, "name", value)  # a function would be an address
    return found


def describe_value(value: object) -> str:
    """An argument in words: `the class AllToAll`, `None`, `a str`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else _article(type(value).__name__)


def _article(name: str) -> str:
    return f"{'an' if name.startswith((*'AEIOUaeiou', 'MoE')) else 'a'} {name}"


def _nearest(value: Any) -> int:
    try:
        return max(int(value), 1)
    except (TypeError, ValueError, OverflowError):  # None, a text of something else, NaN, inf
        return 1
