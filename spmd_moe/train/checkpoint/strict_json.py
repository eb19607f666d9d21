"""JSON that other tools can read, written and parsed without surprises.

JSON has no infinity and no NaN; they are written as `{"__float__": "inf"}`. `from_json` accepts
ASCII only, refuses an object with a key twice, and a number that is not finite.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeAlias

Json: TypeAlias = Any  # None, bool, int, float, str, list, or dict with str keys

FLOAT = "__float__"
_NOT_FINITE = ("inf", "-inf", "nan")
MAX_DEPTH = 64  # of lists and dicts in what is saved; far below the parser's own limit


def to_json(value: Json) -> bytes:
    return json.dumps(_encoded(value), allow_nan=False).encode("ascii")


def from_json(text: bytes) -> Json:
    """Raise ValueError, and nothing else, for text that `to_json` does not write."""
    try:
        return json.loads(
            text.decode("ascii"),
            object_pairs_hook=_object,
            parse_constant=_odd,
            parse_float=_finite,
        )
    except RecursionError:
        _odd("lists nested too deeply")


def _encoded(value: Json) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(value)}
    if isinstance(value, dict):
        return {key: _encoded(v) for key, v in value.items()}
    return [_encoded(v) for v in value] if isinstance(value, list) else value


def _object(pairs: list[tuple[str, Json]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        _odd("a key twice in one object")
    if FLOAT in found:
        if len(found) > 1 or found[FLOAT] not in _NOT_FINITE:
            _odd(f"{FLOAT!r} with another value")
        return float(found[FLOAT])
    return found


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _odd(text)


def _odd(what: str) -> NoReturn:
    raise ValueError(f"not allowed in JSON: {what[:40]}")
