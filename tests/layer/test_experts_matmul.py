"""How the experts multiply: which matmul is chosen, what it reads, and which bits it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spmd_moe import SWIGLU, ConfigError, LoopedMatmul, TorchGroupedMM
from spmd_moe.layer.choose_matmul import choose_matmul
from spmd_moe.layer.grouped_ffn import Call, Recipe, Weights, grouped_ffn
from spmd_moe.layer.grouped_matmul import GroupedMatmul, Masked
from tests.support.experts_oracle import Case
from tests.support.operator_log import Operator, operators

MIXED = (3, 0, 5, 1)


def test_the_choice_of_a_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_matmul(torch.float64, cpu, (5, 7)) == LoopedMatmul()
    assert choose_matmul(torch.float32, cpu, (16, 24)) == LoopedMatmul()
    bf16 = any(v for k, v in torch.cpu.get_capabilities().items() if k.endswith("bf16"))
    chosen = choose_matmul(torch.bfloat16, cpu, (16, 24))
    assert chosen == LoopedMatmul(compute=None if bf16 else torch.float32)
    monkeypatch.setattr("spmd_moe.layer.choose_matmul._WIDENED_ON_THIS_CPU", {torch.bfloat16})
    assert choose_matmul(torch.bfloat16, cpu, (16, 24)) == LoopedMatmul(compute=torch.float32)
    assert choose_matmul(torch.bfloat16, torch.device("meta"), (16, 24)) == LoopedMatmul()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_matmul(torch.bfloat16, cuda, (16, 24)) == TorchGroupedMM()
    assert choose_matmul(torch.bfloat16, cuda, (16, 20)) == LoopedMatmul()
    assert choose_matmul(torch.float32, cuda, (16, 24)) == LoopedMatmul()
    for older_or_other in ((7, 5), (8, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=older_or_other: c)
        assert choose_matmul(torch.bfloat16, cuda, (16, 24)) == LoopedMatmul()


class NoHostReads(TorchDispatchMode):
    """Refuses to bring a value to the host, where a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a read on the host"
        return func(*args, **(kwargs or {}))


def test_all_at_once_never_reads_on_the_host() -> None:
    case = Case(SWIGLU, MIXED, bias=True, dtype=torch.float32)
    layer, given, counts_e = case.layer(TorchGroupedMM()), case.leaves(), torch.tensor(case.counts)
    with NoHostReads():
        layer(given["x"], counts_e, given["scores"]).sum().backward()
    with pytest.raises(AssertionError, match="a read on the host"), NoHostReads():
        counts_e[0].item()


@pytest.mark.parametrize("matmul", [LoopedMatmul(), TorchGroupedMM()], ids=str)
def test_repeats_are_bitwise_equal(matmul: GroupedMatmul) -> None:
    case = Case(SWIGLU, MIXED, bias=True, dtype=torch.float32)
    first, second = case.by_layer(matmul), case.by_layer(matmul)
    assert all(t.any() and torch.equal(t, second[name]) for name, t in first.items())


def test_a_block_of_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="LoopedMatmul: row_block is 0; it must be"):
        LoopedMatmul(row_block=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """With row_block=4 and a hidden width of whole vectors (of 512 bits, twice unrolled), a row has
    the same bits however many rows its expert has."""
    compute = torch.float32 if dtype is torch.bfloat16 else None
    case = Case(SWIGLU, (300, 0), bias=False, dtype=dtype, widths=(48, 64))
    layer, given = case.layer(LoopedMatmul(compute, row_block=4)), case.leaves()
    with torch.no_grad():
        whole = layer(given["x"], torch.tensor([300, 0]), given["scores"])
        assert whole.any()
        for n in (1, 2, 3, 4, 5, 7, 8, 33, 299):
            part = layer(given["x"][:n], torch.tensor([n, 0]), given["scores"][:n])
            assert torch.equal(part, whole[:n]), n


def test_what_multiplies_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for major, found in ((8, Masked), (9, TorchGroupedMM), (10, TorchGroupedMM), (12, Masked)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, m=major: (m, 0))
        chosen = choose_matmul(torch.bfloat16, torch.device("cuda"), (64, 64), fixed=True)
        assert isinstance(chosen, found)
    narrow = choose_matmul(torch.bfloat16, torch.device("cuda"), (63, 64), fixed=True)
    assert isinstance(narrow, Masked)


@pytest.mark.parametrize("again", [False, True])
def test_weights_are_cast_once_for_forward_and_backward(again: bool) -> None:
    """Or once for each, where backward computes again to save memory."""
    w1_eFD, w3_eFD = (torch.randn(2, 24, 16, requires_grad=True) for _ in range(2))
    w = Weights(w1_eFD, torch.randn(2, 16, 24, requires_grad=True), w3_eFD)
    recipe = Recipe(SWIGLU, TorchGroupedMM(), torch.bfloat16, recompute=again, padded=False)
    call = Call(torch.tensor([3, 5]), None, torch.randn(8, 16, requires_grad=True), None, w)
    with operators() as ran:
        y_RD = grouped_ffn(recipe, call)
        forward = casts_of_weights(ran)
        ran.clear()
        y_RD.sum().backward()
    assert (forward, casts_of_weights(ran)) == (3, 3 if again else 0)


def casts_of_weights(ran: list[Operator]) -> int:
    """Casts of three dims from float32; those of gradients are to float32."""
    casts = (o for o in ran if o.name.startswith("aten::_to_copy"))
    return sum(o.dtype is torch.float32 and len(o.shape) == 3 for o in casts)
