"""The loop over experts is two operators to a compiler, a tracer, a mode or a class of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from spmd_moe.layer.activations import SWIGLU
from spmd_moe.layer.experts import experts_ffn
from spmd_moe.layer.grouped_ffn import Weights
from spmd_moe.layer.grouped_matmul import LoopedMatmul
from tests.support.experts_oracle import Case, weights_in
from tests.support.operator_log import operators

CASE = Case(SWIGLU, (3, 0, 5, 1))
COUNTS = torch.tensor(CASE.counts)
GIVEN = {name: t.detach() for name, t in CASE.leaves().items()}
WEIGHTS = weights_in(GIVEN)


def output(x: Tensor, counts: Tensor = COUNTS, weights: Weights | None = None) -> Tensor:
    return experts_ffn(x, counts, weights or WEIGHTS, None, None, SWIGLU, LoopedMatmul())


def rows() -> Tensor:
    return CASE.leaves()["x"].detach()


def test_a_mode_sees_the_operators_and_not_the_loop() -> None:
    with operators() as ran:
        given = CASE.leaves()
        output(given["x"], weights=weights_in(given)).backward(CASE.upstream())
    names = [op.name for op in ran]
    assert names.count("spmd_moe::rows") == 3 + 3 and names.count("spmd_moe::outer") == 3
    assert "aten::mm" not in names


def test_a_mode_of_functions_sees_the_operators() -> None:
    """As a checker of types does, for which an operator is one step."""
    names: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        output(rows())
    assert names.count("spmd_moe.rows.default") == 3
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


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("trace", [make_fx, torch.jit.trace], ids=["fx", "jit"])
def test_a_traced_graph_has_the_operators(trace: Any) -> None:
    """So it is right for other counts than those that it was traced with."""
    other = torch.tensor([0, 2, 2, 5])
    if trace is make_fx:
        graph = make_fx(lambda x, counts: output(x, counts))(rows(), COUNTS)
    else:
        graph = torch.jit.trace(output, (rows(), COUNTS))
    want = output(rows(), other)
    assert want.any() and not want.equal(output(rows()))
    assert graph(rows(), other).equal(want)


def test_a_transform_of_functions_sees_the_operators() -> None:
    want = output(rows())
    functional: Any = torch.func.functionalize(output)
    assert want.any() and functional(rows(), COUNTS).equal(want)
