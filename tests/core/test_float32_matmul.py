"""Float32 matmuls of the router: in float32, also where the program allows TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spmd_moe.core import float32_matmul as file
from spmd_moe.core.float32_matmul import float32_matmul
from spmd_moe.layer.router_logits import router_logits
from spmd_moe.sanitize.tensor_digest import sketch

PRODUCTS = ("mm", "addmm", "matmul", "bmm")


CUDA: Any = torch.backends.cuda
MKLDNN: Any = torch.backends.mkldnn  # torch leaves it untyped


def precisions() -> tuple[str, str]:
    return CUDA.matmul.fp32_precision, MKLDNN.matmul.fp32_precision


class Seen(TorchDispatchMode):
    """The precision that is allowed when a product of float32 runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in PRODUCTS and args[0].dtype is torch.float32:
            self.found += precisions()
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["high", "medium", "newer"])
def reduced(request: pytest.FixtureRequest) -> Iterator[None]:
    """TF32 allowed by torch's older interface, or by its newer one."""
    if request.param == "newer":
        CUDA.matmul.fp32_precision = "tf32"
        MKLDNN.matmul.fp32_precision = "bf16"
    else:
        torch.set_float32_matmul_precision(request.param)
    before = precisions()
    yield
    assert precisions() == before, "what the program has set is as it was"
    CUDA.matmul.fp32_precision = "none"
    MKLDNN.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_their_gradients(dtype: torch.dtype, masked: bool) -> None:
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    weight = torch.randn(4, 8).to(dtype).requires_grad_()
    mask = torch.tensor([True, False, True, True, True]) if masked else None
    with Seen() as seen:
        logits = router_logits(x, weight, mask, torch.float32, torch.float32)
        with torch.no_grad():
            assert torch.equal(router_logits(x, weight, mask, torch.float32, torch.float32), logits)
        # A penalty on the gradient: backward of backward.
        grads = torch.autograd.grad(logits.square().sum(), (x, weight), create_graph=True)
        torch.stack([g.float().square().sum() for g in grads]).sum().backward()
    assert len(seen.found) >= 2 * 8 and set(seen.found) == {"ieee"}
    assert x.grad is not None and weight.grad is not None


@pytest.mark.usefixtures("reduced")
def test_sketches_of_the_sanitizer() -> None:
    with Seen() as seen:
        sketch(torch.randn(12, 16))
    assert set(seen.found) == {"ieee"}


@pytest.mark.usefixtures("reduced")
def test_a_plain_product_is_seen_as_what_it_is() -> None:
    """So the tests above can fail."""
    with Seen() as seen:
        torch.ones(2, 3) @ torch.ones(3, 2)
    assert "tf32" in seen.found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_graph_sets_the_precision_when_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled before the program allows TF32, run afterwards."""
    found: list[str] = []
    real: Callable[..., Tensor] = file._in_full

    def watched(a: Tensor, b: Tensor) -> Tensor:
        with Seen() as seen:
            out = real(a, b)
        found.extend(seen.found)
        return out

    monkeypatch.setattr(file, "_in_full", watched)
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return router_logits(x, weight, None, torch.float32, torch.float32).square().sum()

    want = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled(x, weight)
    try:
        torch.set_float32_matmul_precision("high")
        got = torch.autograd.grad(compiled(x, weight), (x, weight))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))
    assert len(found) >= 2 * 3 and set(found) == {"ieee"}


def test_float64_and_the_default_are_left_alone() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(float32_matmul(x, x.t()), x @ x.t())
    assert precisions() == ("none", "none") or precisions() == ("ieee", "ieee")
