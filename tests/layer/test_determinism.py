"""The same bits on every run, and for a token in every batch, as far as matmuls go.

A CPU's BLAS picks its kernel by the number of rows, and kernels add in different orders. So bits of
a token can change with its company inside a matmul. Here the matmuls are replaced by ones that look
at each row alone: what is left is the layer, and it adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spmd_moe import LoopedMatmul, MoE, MoEConfig, MoEMesh, RouterConfig, SharedConfig, init_weights
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.moe_config import ScoreApplication

WIDTH, TOKENS = 64, 120
COMPANY = (1, 2, 3, 5, 8, 18, 64)  # none leaves a last batch of one
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def row_by_row(x: Tensor, weight: Tensor) -> Tensor:
    """A linear map whose sums run in one order, for any number of rows."""
    y = x.new_zeros(x.shape[0], weight.shape[0])
    for column_x, column_w in zip(x.unbind(1), weight.unbind(1), strict=True):
        y = y + column_x.unsqueeze(1) * column_w
    return y


def layer(dtype: torch.dtype, weigh: ScoreApplication, matmul: LoopedMatmul | None) -> MoE:
    mesh = MoEMesh.single()
    config = MoEConfig(WIDTH, 96, RouterConfig(8, 2), score_application=weigh)
    made = MoE(config, mesh, matmul=matmul)
    init_weights(made, mesh, seed=0, std=0.1)
    return made.to(dtype).eval()


def tokens(dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return drawn.to(dtype)


@torch.no_grad()
def differing(run: Callable[[Tensor], Tensor], x: Tensor, company: int) -> int:
    """How many tokens get other bits in batches of `company` than in one batch of all."""
    whole = run(x)
    assert whole.any() and whole.isfinite().all()
    parts = torch.cat([run(part) for part in x.split(company)])
    return int((parts != whole).any(1).sum())


@pytest.mark.parametrize("weigh", ScoreApplication)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_company(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weigh: ScoreApplication
) -> None:
    monkeypatch.setattr("torch.nn.functional.linear", row_by_row)
    made = layer(dtype, weigh, LoopedMatmul(row_block=4))
    found = {n: differing(lambda x: made(x).hidden, tokens(dtype), n) for n in COMPANY}
    assert set(found.values()) == {0}, found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_torchs_gate_only_a_token_alone_differs(dtype: torch.dtype) -> None:
    """One row is a matrix-vector product to BLAS: the gate's bits, not the layer's order, change.

    The experts' rows are taken in blocks of four here, so their kernel is always the same.
    """
    made = layer(dtype, ScoreApplication.BEFORE_SECOND_MATMUL, LoopedMatmul(row_block=4))
    found = {n: differing(lambda x: made(x).hidden, tokens(dtype), n) for n in COMPANY[1:]}
    assert set(found.values()) == {0}, found


def test_the_comparison_can_fail() -> None:
    """Experts whose matmul sees all rows at once: BLAS takes another kernel for another number."""
    made = layer(torch.float32, ScoreApplication.BEFORE_SECOND_MATMUL, None)
    assert differing(lambda x: made(x).hidden, tokens(torch.float32), 1) > TOKENS / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    """Forward and every gradient, on one process and on four threads with shared experts."""

    def step() -> list[Tensor]:
        mesh = MoEMesh.init("cpu", dp=2, tp=2, ep=2, etp=2)
        config = MoEConfig(WIDTH, 96, RouterConfig(8, 3), shared=SharedConfig(32, sharded=True))
        made = MoE(config, mesh)
        init_weights(made, mesh, seed=0, std=0.1)
        made = made.to(dtype)
        x = tokens(dtype).requires_grad_()
        made(x).hidden.square().sum().backward()
        gradients = [leaf.grad for leaf in (x, *made.parameters())]
        return [grad for grad in gradients if grad is not None]

    first, *others = (threaded(4, step) for _ in range(4))
    assert all(grad.any() for rank in first for grad in rank)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
