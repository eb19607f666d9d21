"""Router weights reach the experts bit for bit, also in a compiled graph.

Inductor computes bfloat16 and float16 in float32. A float32 that travelled as two bfloat16 numbers
would lose bits there: of a half that is a NaN pattern, only "NaN" is kept.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    N  slots    E  experts    R  rows

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

from spmd_moe import AllToAll, DedupAllToAll, Dispatcher, FixedCapacity, MoEMesh
from spmd_moe.check.mirror_world import mirror_world
from tests.support.routings import routing_of

T, K, D, E = 64, 2, 8, 4
MAKE: dict[str, Callable[[MoEMesh], Dispatcher[Any]]] = {
    "fixed": lambda mesh: FixedCapacity(mesh, E, T * K),
    "all_to_all": lambda mesh: AllToAll(mesh, E),
    "dedup": lambda mesh: DedupAllToAll(mesh, E),
}
pytestmark = [
    pytest.mark.usefixtures("no_graphs_of_others"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Inductor imports parts of torch that torch itself has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def halves_of_nan(shift: int) -> Tensor:
    """[T, K] finite float32 numbers whose halves are NaN patterns of bfloat16 and of float16."""
    lows = [0xFF8A, 0x7F81, 0xFFFF, 0x7FA5, 0x7C01, 0xFC35, 0x7DFF, 0x8000]
    bits = [((0x3E05 + shift + n) << 16) | lows[n % len(lows)] for n in range(T * K)]
    scores = torch.tensor(bits, dtype=torch.int32).view(torch.float32).view(T, K)
    assert scores.isfinite().all() and scores.unique().numel() == T * K
    return scores


def step(dispatcher: Dispatcher[Any], row_dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    """Scores at the experts and back, and their gradients: everything that they pass."""
    draw = torch.Generator().manual_seed(0)
    routing = routing_of(torch.randint(0, E, (T, K), generator=draw))
    x = torch.randn(T, D, generator=draw).to(row_dtype)

    def arrive(x_TD: Tensor, scores_TK: Tensor) -> tuple[Tensor, Tensor]:
        arrived, _ = dispatcher.dispatch(x_TD, scores_TK, routing)
        assert arrived.scores_R is not None
        return arrived.scores_R, arrived.rows_RD

    def run(compile_: Callable[..., Any]) -> tuple[Tensor, ...]:
        x_TD, scores_TK = x.clone().requires_grad_(), halves_of_nan(0).requires_grad_()
        scores_R, rows_RD = compile_(arrive)(x_TD, scores_TK)
        back = halves_of_nan(1).flatten()
        grads = torch.cat([back, back.new_zeros(scores_R.shape[0] - T * K)])
        got = torch.autograd.grad(
            (scores_R, rows_RD), (scores_TK, x_TD), (grads, torch.ones_like(rows_RD))
        )
        return scores_R.detach(), rows_RD.detach(), *got

    return run


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row_dtype"),
    [
        ("fixed", torch.bfloat16),
        ("fixed", torch.float16),
        ("all_to_all", torch.bfloat16),
        ("dedup", torch.bfloat16),
    ],
    ids=str,
)
def test_compiled_scores_and_gradients_are_those_of_eager(
    name: str, row_dtype: torch.dtype
) -> None:
    run = step(MAKE[name](MoEMesh.single()), row_dtype)
    eager, compiled = run(lambda f: f), run(torch.compile)
    sent, came = halves_of_nan(0).flatten(), eager[0]
    assert torch.equal(came[came > 0].sort().values, sent.sort().values)
    for got, want in zip(compiled, eager, strict=True):
        assert got.dtype is want.dtype and torch.equal(bits(got), bits(want))


def graphs_of(name: str) -> list[GraphModule]:
    """What torch hands to Inductor, forward and backward, on one rank of two."""
    found: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: object) -> Any:
        found.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with mirror_world(2):
        run = step(MAKE[name](MoEMesh.init("cpu", dp=2, ep=2)), torch.bfloat16)
        run(lambda f: torch.compile(f, backend=backend))
    return found


@pytest.mark.parametrize("name", MAKE)
def test_no_kernel_of_a_graph_can_touch_the_bits_of_scores(name: str) -> None:
    """On CUDA, Inductor's kernels load each bfloat16 as float32. So scores travel as float32."""
    nodes = [node for graph in graphs_of(name) for node in graph.graph.nodes]
    assert [str(node) for node in nodes if "view.dtype" in str(node.target)] == []
    sent = [n.args[0].meta["val"] for n in nodes if "all_to_all_single" in str(n.target)]
    assert {x.dtype for x in sent} >= {torch.bfloat16, torch.float32}
    assert {x.shape[1] for x in sent if x.dtype is torch.bfloat16} == {D}, "rows and nothing else"
