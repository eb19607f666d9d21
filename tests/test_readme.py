"""The README is true: its programs print what it shows, its tables and files are the code's."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmd_moe import DP, TP, MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
from tests.readme import README, Block, blocks, file_tree, generated, outcome, rewritten
from tests.threads import threaded

TEXT = README.read_text()


@pytest.mark.parametrize("block", list(blocks(TEXT)), ids=lambda b: f"block {b.number}")
def test_programs_do_what_is_shown(block: Block) -> None:
    got = outcome(block)  # an error that is not ours ends the test
    assert block.shown is None or got == block.shown, block.code


def test_generated_parts_are_fresh() -> None:
    assert generated(TEXT) == TEXT, "python -m tests.readme --write"


def test_every_file_says_what_it_is() -> None:
    assert all(len(line.split()) > 2 for line in file_tree().splitlines() if line.startswith("  "))


def test_it_opens_with_a_program_that_fails_and_its_fix() -> None:
    head = TEXT.splitlines()[:25]
    assert head.index("```python") < 10 and any(line.startswith("The fix is") for line in head)
    (fix,) = re.findall(r"The fix is one argument: `(.*)`", TEXT)
    first = next(blocks(TEXT))
    failing = first.code.splitlines()[-1].partition("#")[0].strip()
    program = first.code.replace(failing, fix.replace("(x, ", "(torch.ones(5, 8), "))
    cured = "from spmd_moe import ShardShape\n" + program
    assert outcome(Block(0, cured, None)) == "" != outcome(first)


def owed(reduce_gradients: Callable[[nn.Module, MoEMesh], None] | None) -> Tensor:
    """The router's gradient, from the same tokens on one process or on four."""
    mesh = MoEMesh.init("cpu", dp=2, tp=2, ep=4) if dist.is_initialized() else MoEMesh.single()
    layer = MoE(MoEConfig(6, 8, RouterConfig(8, 2)), mesh)
    init_weights(layer, mesh, seed=0, std=1.0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    place = mesh[DP].rank * mesh[TP].size + mesh[TP].rank
    x = x.chunk(mesh[DP].size * mesh[TP].size)[place]
    layer(x).hidden.square().sum().backward()
    if reduce_gradients is not None:
        reduce_gradients(layer, mesh)
    assert layer.router.weight_ED.grad is not None
    return layer.router.weight_ED.grad


def test_what_a_parameter_owes_is_paid() -> None:
    """By the README's own program, on four ranks; without it the sum over dp is missing."""
    (code,) = (b.code for b in blocks(TEXT) if "def reduce_gradients" in b.code)
    names: dict[str, Any] = {"__name__": "program"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "program.py", "exec"), names)
    alone = owed(None)
    assert alone.any()
    for grad in threaded(4, owed, names["reduce_gradients"]):
        torch.testing.assert_close(grad, alone)
    assert not any(torch.allclose(grad, alone) for grad in threaded(4, owed, None))


def test_a_stale_readme_is_found() -> None:
    stale = TEXT.replace("all_reduce (P to I)", "all_reduce (P to R)")
    assert stale != TEXT and generated(stale) == TEXT
    wrong = TEXT.replace("5 rows as [2, 2, 1, 0] - 2", "5 rows as [2, 2, 1, 0] - 3")
    assert wrong != TEXT and rewritten(wrong) == TEXT
