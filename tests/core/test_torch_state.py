"""The loop over experts is an operator wherever somebody follows operators, and nowhere else.

What `followed` asks is private to torch (2.13): where a name is gone, or no longer says what it
said, a test here fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from spmd_moe.core.torch_state import is_traced
from spmd_moe.layer import per_expert
from spmd_moe.layer.activations import SWIGLU
from spmd_moe.layer.experts import experts_ffn
from spmd_moe.layer.grouped_ffn import Weights
from spmd_moe.layer.grouped_matmul import PerExpert
from tests.support.experts_oracle import Case, weights_in
from tests.support.operator_log import operators

CASE = Case(SWIGLU, (3, 0, 5, 1))
COUNTS = torch.tensor(CASE.counts)
GIVEN = {name: t.detach() for name, t in CASE.leaves().items()}
WEIGHTS = weights_in(GIVEN)
OURS = ["spmd_moe::experts_forward", "spmd_moe::experts_backward"]


def output(x: Tensor, counts: Tensor = COUNTS, weights: Weights | None = None) -> Tensor:
    return experts_ffn(x, counts, weights or WEIGHTS, None, None, SWIGLU, PerExpert())


def rows() -> Tensor:
    return CASE.leaves()["x"].detach()


def gradients() -> list[Tensor]:
    given = CASE.leaves()
    y = output(given["x"], weights=weights_in(given))
    y.backward(CASE.upstream())
    return [y.detach(), *(t.grad for t in given.values() if t.grad is not None)]


def test_plain_tensors_run_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    flat = per_expert._Flat.of

    def watched(*call: Any) -> per_expert._Flat:
        called.append("operator")
        return flat(*call)

    monkeypatch.setattr(per_expert._Flat, "of", watched)
    plain = gradients()
    assert called == []
    with operators() as ran:
        seen = gradients()
    names = [name for name, _ in ran]
    assert called == ["operator"] * 2
    assert [name for name in names if name in OURS] == OURS and "aten::mm" not in names
    assert len(plain) == len(seen) == 5
    assert all(a.any() and a.equal(b) for a, b in zip(plain, seen, strict=True))


def test_a_mode_of_functions_sees_the_operator() -> None:
    """As a checker of types does, for which the operator is one step."""
    names: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        output(rows())
    assert "spmd_moe.experts_forward.default" in names
    assert not [name for name in names if "method mm" in name]


@pytest.mark.parametrize("fake", ["weights", "counts"])
def test_tensors_of_a_class_need_no_mode(fake: str) -> None:
    """Of any argument: beside it, the rows may be plain."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counts, w = COUNTS, WEIGHTS
    if fake == "counts":
        counts = mode.from_tensor(counts)
    else:
        w = weights_in({name: mode.from_tensor(t) for name, t in GIVEN.items()})
    y = output(rows(), counts, w)
    assert isinstance(y, FakeTensor) and y.shape == rows().shape


def test_a_traced_graph_has_the_operator() -> None:
    """So it is right for other counts than those that it was traced with."""
    other = torch.tensor([0, 2, 2, 5])
    graph = make_fx(lambda x, counts: output(x, counts))(rows(), COUNTS)
    want = output(rows(), other)
    assert want.any() and not want.equal(output(rows()))
    assert graph(rows(), other).equal(want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_torchs_old_tracer_is_refused_by_the_operator() -> None:
    """Of the loop it would keep the counts that it saw."""
    with pytest.raises(RuntimeError, match="unsupported input list type"):
        torch.jit.trace(output, (rows(), COUNTS))


def test_a_transform_of_functions_sees_the_operator() -> None:
    want = output(rows())
    functional: Callable[..., Tensor] = torch.func.functionalize(output)
    assert want.any() and functional(rows(), COUNTS).equal(want)


def test_nobody_follows_when_all_is_over() -> None:
    assert not is_traced(rows(), torch.nn.Parameter(rows()))
