"""The typing rules of operations, per axis: spmd_types' own, as a table and one function.

The table `ops.json` is generated from spmd_types (`python -m spmd_moe.tooling.write_ops_json
--write`); a test compares both with spmd_types' own inference on every combination of kinds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

from spmd_moe.static.kinds import (
    ANY_ROLE,
    REPORTED,
    Kinds,
    is_shard,
    kind_on,
    letter,
    local,
    on_presentation,
    presentation,
    roles_of,
)

TABLE_FILE = Path(__file__).with_name("ops.json")
SCALAR = "number"  # a Python number among the operands; it has no placement


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an operation cannot be: on which role, of which kinds, and the algebra of it."""

    role: str
    kinds: tuple[str, ...]
    why: str


@cache
def table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(TABLE_FILE.read_text())
    return loaded


def infer_axis(kinds: Sequence[str], linearity: str) -> str | None:
    """The kind of the result on one axis; None where the operands do not go together."""
    found = set(kinds)
    tensors = found - {SCALAR}
    for lone in ("R", "I", "V"):
        if tensors == {lone}:
            return lone
    if tensors == {"R", "V"}:
        return "V"
    if tensors == {"P"} and linearity == "linear" and SCALAR not in found:
        return "P"
    if tensors <= {"P", "R"} and linearity == "multilinear" and kinds.count("P") == 1:
        return "P"
    return None


def why_not(kinds: Sequence[str], linearity: str) -> str:
    """The clause of algebra behind a None of `infer_axis`."""
    found = set(kinds)
    if "I" in found:
        return "I mixes with nothing: what meets it has to be used alike on all ranks as well"
    if "V" in found:
        return "a part of a sum plus, or times, what is each rank's own is neither"
    if linearity == "nonlinear":
        return (
            "not linear, and of a sum over ranks only linear operations can be taken rank by rank"
        )
    if linearity == "multilinear":
        return "the product of two sums is not the sum of the products: reduce all but one"
    return "what is not P would be added once for every rank"


def infer(operands: Sequence[Kinds | None], linearity: str) -> tuple[Kinds, Refusal | None]:
    """Kinds of the result, and the first refusal. An operand None is a Python number.

    Where something is not known, the result is what it must be if there is no error.
    """
    tensors = _on_one_presentation([o for o in operands if o is not None])
    numbers = [SCALAR] * (len(operands) - len(tensors))
    result: dict[str, str] = {}
    refusal = None
    for role in roles_of(tensors):
        if any(o.get(role, o.get(ANY_ROLE)) == REPORTED for o in tensors):
            result[role] = REPORTED
            continue
        known = _known(tensors, role)
        if not known:
            continue
        each = [local(kind) for kind in known] + numbers
        kind = infer_axis(each, linearity)
        if kind is None:
            refusal = refusal or Refusal(role, tuple(known), why_not(each, linearity))
            result[role] = REPORTED
        elif len(known) == len(tensors) or _holds_whatever_joins(kind, linearity):
            result[role] = kind
    return result, refusal


def _known(tensors: Sequence[Kinds], role: str) -> list[str]:
    """The kinds on a role. Constants get no gradient, so where others are I they are I as well."""
    known = [(k, role in o) for o in tensors if (k := kind_on(o, role)) is not None]
    if ("I", True) in known:
        return [k if own else "I" for k, own in known]
    return [k for k, _ in known]


def _holds_whatever_joins(kind: str, linearity: str) -> bool:
    """Whether no further operand could change the kind without being an error."""
    return kind in ("I", "V") or kind == "P"


def _on_one_presentation(tensors: list[Kinds]) -> list[Kinds]:
    """All operands on the presentation of the first that has one, as far as they can be."""
    target = next((p for p in map(presentation, tensors) if p is not None), None)
    seen = [on_presentation(kinds, target) for kinds in tensors]
    if None in seen:  # the other way round
        target = next(p for p, s in zip(map(presentation, tensors), seen, strict=True) if s is None)
        seen = [on_presentation(kinds, target) for kinds in tensors]
    return [old if new is None else new for old, new in zip(tensors, seen, strict=True)]


@final
@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a call: where it stands, by name where so given; None for a number."""

    position: int
    kinds: Kinds | None
    keyword: str | None = None


def infer_operation(name: str, operands: Sequence[Operand]) -> tuple[Kinds, Refusal | None]:
    """Kinds of the result of the operation `name`, such as `torch.add` or `Tensor.__matmul__`."""
    row = table()["operations"].get(name, {})
    linearity = row.get("linearity", "nonlinear")
    tensors = [o.kinds for o in operands if o.kinds is not None]
    if name in table()["new_factories"] or (name in table()["factories"] and not tensors):
        return {ANY_ROLE: "R"}, None
    kinds = [o.kinds for o in operands if o.kinds is not None or _counts(o, row)]
    if linearity == "sum_and_product":
        product, refusal = infer(kinds[1:], "multilinear")
        total, refused = infer([kinds[0], product], "linear")
        return total, refusal or refused
    if name == "Tensor.backward":
        return {}, _not_a_loss(operands)
    result, refusal = infer(kinds, linearity)
    divided = _divides_by_p(operands, row)
    if divided is not None:
        result = {**result, divided.role: REPORTED}
    return same_shape(name, tensors, result), refusal or divided


def takes_part(name: str, operand: Operand) -> bool:
    """Whether the kinds of a result depend on an operand: a dim, for one, is only a number."""
    return operand.kinds is not None or _counts(operand, table()["operations"].get(name, {}))


def _counts(operand: Operand, row: Mapping[str, Any]) -> bool:
    """Whether a number stands where a tensor might, and so takes part in the rule."""
    if operand.keyword is not None:
        return operand.keyword in row.get("numbers_named", ())
    return operand.position in row.get("numbers_at", ())


def _not_a_loss(operands: Sequence[Operand]) -> Refusal | None:
    """Backward begins with a 1 on every rank. That is the gradient of I and of P alone."""
    for role, kind in (operands[0].kinds or {}).items():
        if len(operands) == 1 and local(kind) in ("R", "V"):
            why = "every rank begins backward with a gradient of 1, as it is for I and for P alone"
            return Refusal(role, (kind,), why)
    return None


def _divides_by_p(operands: Sequence[Operand], row: Mapping[str, Any]) -> Refusal | None:
    for operand in operands:
        if operand.position not in row.get("nonlinear_at", ()):
            continue
        for role, kind in (operand.kinds or {}).items():
            if kind == "P":
                return Refusal(role, (kind,), "the operation is not linear in what it divides by")
    return None


def same_shape(name: str, operands: Sequence[Kinds], result: Kinds) -> Kinds:
    """Shards keep their dim through operations of one operand that keep its shape."""
    if len(operands) != 1 or name.rpartition(".")[2] not in _KEEP_SHAPE:
        return result
    (only,) = operands
    return {r: only[r] if k == "V" and is_shard(only.get(r, k)) else k for r, k in result.items()}


_KEEP_SHAPE = frozenset(
    {"clone", "contiguous", "detach", "to", "float", "double", "half", "bfloat16"}
    | {"neg", "__neg__", "abs", "exp", "log", "sqrt", "sigmoid", "tanh", "relu", "silu", "gelu"}
    | {"clamp", "zeros_like", "ones_like", "empty_like", "full_like"}
)


# --- moves ------------------------------------------------------------------------------------


def moves_from(kind: str) -> dict[str, str]:
    """Where a kind can be taken, and by which move."""
    moves: Mapping[str, str] = table()["moves"]
    pairs = ([*pair.split(" "), name] for pair, name in moves.items())
    return {dst: name for src, dst, name in pairs if src == letter(kind)}


def is_move(src: str, dst: str) -> bool:
    return src == dst or f"{letter(src)} {letter(dst)}" in table()["moves"]


def gradient(kind: str) -> str:
    """The kind of a tensor's gradient."""
    return {"R": "P", "P": "R"}.get(kind, kind)
