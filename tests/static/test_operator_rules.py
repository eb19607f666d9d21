"""One truth: the static check's table and rules against spmd_types' own inference, all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as fn
from spmd_types import (
    I,
    MeshAxis,
    P,
    R,
    SpmdTypeError,
    V,
    _checker,
    assert_type,
    get_local_type,
    set_current_mesh,
)
from spmd_types.checker import typecheck
from torch import Tensor

from spmd_moe.core.moves import MOVES
from spmd_moe.static.kinds import fits, on_presentation, read, shown, write
from spmd_moe.static.operator_rules import (
    SCALAR,
    TABLE_FILE,
    Operand,
    infer,
    infer_axis,
    infer_operation,
    is_move,
    moves_from,
    table,
    why_not,
)
from spmd_moe.tooling.write_ops_json import names_of, text
from tests.static.test_typecheck import ROOT, mypy
from tests.support.simulated_ranks import fake_world

KINDS = {"R": R, "I": I, "V": V, "P": P}
AXIS = MeshAxis.of(4, 1)
LINEARITIES = [linearity.name.lower() for linearity in _checker.OpLinearity]


def theirs(kinds: Sequence[str], linearity: str) -> str | None:
    """What spmd_types infers; None where it refuses."""
    own: dict[str, Any] = {**KINDS, SCALAR: _checker._Scalar}
    try:
        found = _checker._infer_local_type_for_axis_raw(
            AXIS,
            [own[kind] for kind in kinds],
            linearity=_checker.OpLinearity[linearity.upper()],
        )
    except SpmdTypeError:
        return None
    return str(found.value)


def test_the_table_is_fresh() -> None:
    assert text() == TABLE_FILE.read_text(), (
        "run: python -m spmd_moe.tooling.write_ops_json --write"
    )


@pytest.mark.parametrize("linearity", LINEARITIES)
def test_rules_are_spmd_types_own(linearity: str) -> None:
    """Every combination of up to four operands, with Python numbers among them."""
    compared = 0
    for count in (1, 2, 3, 4):
        for kinds in product([*KINDS, SCALAR], repeat=count):
            if set(kinds) == {SCALAR}:
                continue
            assert infer_axis(kinds, linearity) == theirs(kinds, linearity), kinds
            assert theirs(kinds, linearity) is not None or why_not(kinds, linearity)
            compared += 1
    assert compared == 776


def test_every_operation_infers_as_spmd_types_does() -> None:
    """Every row of the registry, with every combination of up to three operands at its places."""
    compared = 0
    for name, operation in names_of(_checker._OP_REGISTRY).items():
        spec = _checker._OP_REGISTRY[operation]
        linearity = spec.linearity.name.lower()
        for count in (1, 2, 3):
            for kinds in product([*KINDS, SCALAR], repeat=count):
                counted = [k for i, k in enumerate(kinds) if k != SCALAR or i in spec.tensor_args]
                if set(counted) <= {SCALAR}:
                    continue
                wanted = theirs(counted, linearity)
                if any(i < count and kinds[i] == "P" for i in spec.nonlinear_args):
                    wanted = None
                operands = [
                    Operand(i, None if k == SCALAR else {"TP": k}) for i, k in enumerate(kinds)
                ]
                found, refusal = infer_operation(name, operands)
                assert (found["TP"] if refusal is None else None) == wanted, (name, kinds)
                compared += 1
    assert compared > 20_000


def test_sums_of_products_infer_as_spmd_types_does() -> None:
    for name, operation in names_of(_checker._DECOMP_TYPE_RULES).items():
        for kinds in product(KINDS, repeat=3):
            try:
                rule = _checker._DECOMP_TYPE_RULES[operation]
                wanted = rule(*({AXIS: KINDS[kind]} for kind in kinds))[AXIS].value
            except SpmdTypeError:
                wanted = None
            found, refusal = infer_operation(
                name, [Operand(i, {"TP": k}) for i, k in enumerate(kinds)]
            )
            assert (found["TP"] if refusal is None else None) == wanted, (name, kinds)


def test_unknown_operands_leave_what_must_be() -> None:
    assert infer([{"TP": "R"}, {}], "nonlinear") == ({}, None)
    assert infer([{"TP": "V"}, {}], "nonlinear") == ({"TP": "V"}, None)
    assert infer([{"TP": "P"}, {}], "linear") == ({"TP": "P"}, None)
    assert infer([{"TP": "I"}, {"DP": "R"}], "linear") == ({"TP": "I"}, None)
    kinds, refusal = infer([{"TP": "P", "DP": "R"}, {"TP": "V"}], "linear")
    assert kinds == {"TP": "?"} and refusal is not None and refusal.role == "TP"
    assert infer([kinds, {"TP": "P"}], "linear") == ({"TP": "?"}, None)  # one mistake, one error


def test_the_meshes_carry_over_what_is_alike_on_all_axes() -> None:
    expert = ("EDP", "EP", "ETP")
    same = {"DP": "V", "CP": "V", "TP": "S(0)"}
    assert on_presentation(same, expert) == {"EDP": "V", "EP": "V", "ETP": "V"}
    assert on_presentation({"DP": "V", "CP": "V", "TP": "R"}, expert) is None
    assert on_presentation({"DP": "V"}, expert) is None
    assert on_presentation({"X": "V"}, expert) == {"X": "V"}


def test_what_fits_where_it_is_declared() -> None:
    alike = {("V", "S(0)"), ("S(0)", "V"), ("S(1)", "V"), ("V", "S(1)")}
    kinds = ["R", "I", "V", "P", "S(0)", "S(1)"]
    for have, need in product(kinds, repeat=2):
        assert fits(have, need) == (have == need or (have, need) in alike), (have, need)
    assert fits("?", "P")


def test_moves_are_those_of_the_library() -> None:
    for src, dst in product("RIVPS", repeat=2):
        assert is_move(src, dst) == (src == dst or (src, dst) in MOVES)
    assert moves_from("S(1)") == {d: row.name for (s, d), row in MOVES.items() if s == "S"}
    assert moves_from("V") == {}


def test_kinds_are_written_and_read() -> None:
    kinds = {"DP": "V", "TP": "S(-1)"}
    assert read(write(kinds)) == kinds and shown(kinds) == "DP[V] TP[S[-1]]"


def test_the_rules_load_no_torch() -> None:
    modules = "spmd_moe.static.operator_rules, spmd_moe.mypy_plugin"
    program = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
    assert table()["operations"]["torch.add"]["linearity"] == "linear"


# --- the plugin itself, beside spmd_types at run time -----------------------------------------

ONE = ["x.T", "x.sum(0)", "x.exp()", "-x", "x * 2", "2 - x", "x / 2", "x.topk(1).values", "x[0]"]
ONE += ["torch.softmax(x, 0)", "torch.chunk(x, 2)[0]", "fn.silu(x)", "x.to(torch.float64)"]
TWO = ["x + y", "x - y", "x * y", "x / y", "x @ y", "torch.cat([x, y])", "torch.stack((x, y))"]
TWO += [
    "fn.linear(x, y)",
    "torch.maximum(x, y)",
    "torch.where(x > 0, x, y)",
    "torch.dot(x[0], y[0])",
]
TWO += ["torch.einsum('ab,bc->ac', x, y)", "x.view_as(y)", "torch.addmm(x, x, y)", "x == y"]
PROGRAMS: list[tuple[str, tuple[str, ...]]] = [(c, (kind,)) for c in ONE for kind in KINDS]
PROGRAMS += [(code, kinds) for code in TWO for kinds in product(KINDS, repeat=2)]


def at_run_time(code: str, kinds: tuple[str, ...]) -> str:
    """What spmd_types says of one line; `?` where it refuses."""
    world = torch.distributed.group.WORLD
    assert world is not None
    axis = MeshAxis.of(world)
    operands = [torch.ones(2, 2, requires_grad=True) * 1 for _ in kinds]
    with set_current_mesh({"tp": axis}), typecheck(strict_mode="strict", local=True):
        for operand, kind in zip(operands, kinds, strict=True):
            assert_type(operand, {axis: KINDS[kind]})
        names: dict[str, object] = {"torch": torch, "fn": fn, **dict(zip("xy", operands))}  # noqa: B905
        try:
            result = eval(code, names)
        except SpmdTypeError:
            return "?"
        assert isinstance(result, Tensor)
        return str(get_local_type(result)[axis].value)


@pytest.mark.slow
def test_the_plugin_says_what_spmd_types_says(tmp_path: Path) -> None:
    head = "import torch\nimport torch.nn.functional as fn\nfrom torch import Tensor\n"
    head += "from spmd_moe import TP, I, P, Placed, R, V\n"
    lines = [
        f"def f{n}({arguments(kinds)}) -> None: reveal_type({code})"
        for n, (code, kinds) in enumerate(PROGRAMS)
    ]
    path = tmp_path / "programs.py"
    path.write_text(head + "\n".join(lines) + "\n")
    said = mypy("--config-file", ROOT / "pyproject.toml", path)
    shown_on = {int(n): kind for n, kind in re.findall(r":(\d+): note: .*\"TP\[(.)\]\"", said)}
    first = head.count("\n") + 1
    with fake_world(4):
        wanted = {first + n: at_run_time(*program) for n, program in enumerate(PROGRAMS)}
    assert shown_on == wanted and len(wanted) == len(PROGRAMS) > 250
    assert set(wanted.values()) == {"R", "I", "V", "P", "?"}


def arguments(kinds: tuple[str, ...]) -> str:
    return ", ".join(f"{n}: Placed[Tensor, TP[{k}]]" for n, k in zip("xy", kinds, strict=False))
