"""Operator table: writes `static/ops.json` from spmd_types and from the table of moves.

    python -m spmd_moe.tooling.write_ops_json --write

This is the only file that reads private names of spmd_types for the static check.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
from spmd_types import _checker, rules
from torch import Tensor

from spmd_moe.core.moves import MOVES
from spmd_moe.static.operator_rules import TABLE_FILE

TRANSITIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "reinterpret", "convert")


def names_of(operations: Any) -> dict[str, Any]:
    """Every name that torch gives to each of the operations."""
    wanted = set(operations)
    found: dict[str, Any] = {}
    for owner, prefix in ((torch, "torch"), (Tensor, "Tensor")):
        for name in sorted(dir(owner)):
            value = getattr(owner, name, None)
            for operation in (value, getattr(value, "__get__", None)):
                if callable(operation) and _hashable(operation) and operation in wanted:
                    found[f"{prefix}.{name}"] = operation
    return found


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def operations() -> dict[str, dict[str, Any]]:
    registry = _checker._OP_REGISTRY
    rows = {}
    for name, operation in names_of(registry).items():
        spec = registry[operation]
        row: dict[str, Any] = {"linearity": spec.linearity.name.lower()}
        if spec.tensor_args:
            row["numbers_at"] = list(spec.tensor_args)
        if spec.tensor_kwargs:
            row["numbers_named"] = list(spec.tensor_kwargs)
        if spec.nonlinear_args:
            row["nonlinear_at"] = list(spec.nonlinear_args)
        rows[name] = row
    for name in names_of(_checker._DECOMP_TYPE_RULES):
        rows[name] = {"linearity": "sum_and_product"}
    return rows


def transitions() -> dict[str, list[str]]:
    """The pairs that spmd_types' collectives admit. X1: what is summed is P and nothing else."""
    found: dict[str, list[str]] = {}

    def record(
        x: object, kind: str, axis: object, src: object, dst: object, allowed: Any, **_: Any
    ) -> None:
        found[kind] = [
            f"{s} {d}"
            for a, b in allowed
            for s in ("P" if a == "P|V" else _letter(a)).split("|")
            for d in _letter(b).split("|")
        ]

    with mock.patch.object(rules, "_transition", record):
        for name in TRANSITIONS:
            getattr(rules, name)(None, None, src=None, dst=None)
    return found


def _letter(kind: Any) -> str:
    """R, I, V, P; a choice such as `V|S` is a str already."""
    return str(getattr(kind, "value", kind))


def defaults() -> dict[str, dict[str, str | None]]:
    return {
        function.__name__: {
            key: None if kind is None else _letter(kind) for key, kind in row.items()
        }
        for function, row in _checker._SPMD_FUNCTION_DEFAULTS.items()
    }


def made() -> dict[str, Any]:
    return {
        "operations": dict(sorted(operations().items())),
        "factories": sorted(names_of(_checker._DETERMINISTIC_FACTORIES)),
        "new_factories": sorted(names_of(_checker._DETERMINISTIC_NEW_FACTORIES)),
        "pass_through": sorted(names_of(_checker._PASSTHROUGH)),
        "transitions": transitions(),
        "defaults": defaults(),
        "moves": {f"{src} {dst}": row.name for (src, dst), row in MOVES.items()},
        "moves_do": {f"{src} {dst}": row.does for (src, dst), row in MOVES.items()},
    }


def text() -> str:
    """One line for each row, so that a change of the table can be read."""
    blocks = []
    for name, rows in made().items():
        lines = (
            [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()]
            if isinstance(rows, dict)
            else [f"    {json.dumps(v)}" for v in rows]
        )
        opening, closing = ("{", "}") if isinstance(rows, dict) else ("[", "]")
        blocks.append(f"  {json.dumps(name)}: {opening}\n" + ",\n".join(lines) + f"\n  {closing}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        TABLE_FILE.write_text(text())
    else:
        print(text())
