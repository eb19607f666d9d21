"""What the layer does not cost: no autograd where there is no backward, no types at run time."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spmd_moe import (
    TP,
    AllGather,
    AllToAll,
    DedupAllToAll,
    I,
    Kind,
    MoE,
    MoEConfig,
    MoEMesh,
    R,
    RouterConfig,
    S,
    ScoreApplication,
    SharedConfig,
    init_weights,
)
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.grouped_matmul import TorchGroupedMM
from tests.bench.layer import FLOAT32, Pair, Row, Sizes, measure
from tests.layer.test_decode import METHODS
from tests.support.dispatchers import DISPATCHERS, SHARDED
from tests.support.operator_log import operators
from tests.test_layering import LAYER, sources

ROUTER = RouterConfig(num_experts=4, top_k=2)
CONFIGS = {
    "plain": MoEConfig(16, 32, ROUTER),
    "bias": MoEConfig(16, 32, ROUTER, bias=True),
    "weigh_in_combine": MoEConfig(16, 32, ROUTER, score_application=ScoreApplication.IN_COMBINE),
    "shared": MoEConfig(16, 32, ROUTER, shared=SharedConfig(32, gated=True, sharded=True)),
    "balance": MoEConfig(16, 32, ROUTER, balance="sequence"),
}


# --- decode -----------------------------------------------------------------------------------


def built(config: MoEConfig) -> MoE:
    mesh = MoEMesh.single()
    layer = MoE(config, mesh).eval()
    init_weights(layer, mesh, seed=0)
    return layer


def bookkeeping(
    patch: pytest.MonkeyPatch, layer: MoE, tokens: Tensor, *more: Tensor | None
) -> tuple[list[str], Tensor]:
    """What autograd is told in a forward: functions applied, tensors kept. And the output."""
    told: list[str] = []
    apply = vars(torch.autograd.Function)["apply"].__func__

    def noted(cls: type, *args: Any, **kwargs: Any) -> Any:
        told.append(cls.__name__)
        return apply(cls, *args, **kwargs)

    def kept(x: Tensor) -> Tensor:
        told.append(f"kept {tuple(x.shape)}")
        return x

    patch.setattr(torch.autograd.Function, "apply", classmethod(noted))
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        out = layer(tokens, *more)
    patch.undo()
    return told, out.hidden


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_tells_autograd_nothing(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = built(CONFIGS[name]), torch.randn(2, 3, 16)
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None
    with torch.no_grad():
        told, y = bookkeeping(monkeypatch, layer, x, mask)
    assert told == [] and y.grad_fn is None and not y.requires_grad


def decoded(dispatcher: str, name: str, src: Kind, held: list[Tensor]) -> Tensor:
    """What a rank gets; every one of four has all tokens, or a part."""
    mesh = MoEMesh.init("cpu", dp=2, tp=2, ep=2, etp=2)
    layer = MoE(replace(CONFIGS[name], src=src), mesh, DISPATCHERS[dispatcher](mesh, 4)).eval()
    init_weights(layer, mesh, seed=0)
    hidden: Tensor = layer(held[mesh[TP].rank]).hidden
    return hidden + 0  # waited for


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dispatcher", SHARDED)
def test_decode_on_many_ranks_tells_autograd_nothing(
    dispatcher: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives what training gives."""
    src = R if dispatcher == "fixed" else S(0)
    held = [torch.randn(3, 16)] * 2 if src is R else [torch.randn(n, 16) for n in (3, 1)]
    want = threaded(4, decoded, dispatcher, name, src, held)
    told: list[str] = []

    def noted(cls: type, *args: Any, **kwargs: Any) -> Any:
        told.append(cls.__name__)
        return apply(cls, *args, **kwargs)

    apply = vars(torch.autograd.Function)["apply"].__func__
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(noted))
    got = threaded(4, torch.no_grad()(decoded), dispatcher, name, src, held)
    assert told == []
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b) and a.requires_grad and not b.requires_grad and a.any()
    threaded(4, decoded, dispatcher, name, src, held)
    assert {"Exchange", "Move"} & set(told)


def test_decode_gives_what_training_gives() -> None:
    """The way without autograd is another one in places: the same bits come out of it."""
    layer, x = built(CONFIGS["plain"]), torch.randn(5, 16)
    mask = torch.tensor([True, False, True, True, True])
    for given in (None, mask):
        with torch.no_grad():
            y = layer(x, given).hidden
        assert torch.equal(y, layer(x, given).hidden)


def test_the_bookkeeping_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    told, y = bookkeeping(monkeypatch, built(CONFIGS["plain"]), torch.randn(3, 16))
    assert {"_GroupedFFN", "_Fold", "kept (3, 16)"} <= set(told) and y.grad_fn is not None


# --- waiting ----------------------------------------------------------------------------------


def while_rows_come_back() -> list[str]:
    """The matmuls between sending the experts' rows back and their first use, which waits."""
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    layer = MoE(MoEConfig(16, 32, ROUTER, shared=SharedConfig(32)), mesh)
    init_weights(layer, mesh, seed=0)
    with operators() as ran:
        layer(torch.ones(3, 16))
    names = [operator.name for operator in ran]
    sent = max(i for i, name in enumerate(names) if "all_to_all" in name)
    used = next(i for i, name in enumerate(names) if i > sent and "embedding_bag" in name)
    return [name for name in names[sent:used] if name == "aten::mm"]


def test_the_shared_expert_computes_while_rows_travel() -> None:
    assert threaded(2, while_rows_come_back) == [["aten::mm"] * 3] * 2


# --- what the host reads ----------------------------------------------------------------------


class Reads(TorchFunctionMode):
    """The functions of this package that wait for a number, as they do."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            frame = inspect.currentframe()
            while frame is not None and "/spmd_moe/" not in frame.f_code.co_filename:
                frame = frame.f_back
            self.by.append("" if frame is None else frame.f_code.co_name)
        return func(*args, **(kwargs or {}))


def reads_of(dispatcher: Any, degrees: dict[str, int], changes: dict[str, Any]) -> Counter[str]:
    mesh = MoEMesh.init("cpu", **degrees)
    config = replace(CONFIGS["plain"], **changes)
    # the loop over experts, which a CPU has, reads their counts; a grouped matmul does not
    layer = MoE(config, mesh, dispatcher and dispatcher(mesh, 4), matmul=TorchGroupedMM())
    init_weights(layer, mesh, seed=0)
    masks = [None, torch.tensor([True, False, True])]
    with Reads() as reads:
        for mask in masks:
            layer(torch.ones(3, 16), mask).hidden.sum().backward()
    return Counter(reads.by)


@pytest.mark.parametrize(
    ("dispatcher", "degrees", "changes", "reads"),
    [
        # each twice, without and with a mask, which is one read more where nothing is exchanged:
        # how many slots are left
        (None, {"dp": 2}, {}, 1 + 2),
        (None, {"tp": 2}, {"src": R, "dst": R}, 1 + 2),
        (None, {"tp": 2}, {"dst": R, "shared": SharedConfig(32, sharded=True)}, 2 + 3),
        (AllToAll, {"dp": 2, "ep": 2}, {"balance": "sequence"}, 1 + 1),
        (AllToAll, {"tp": 2, "etp": 2}, {"src": I, "dst": I, "bias": True}, 1 + 1),
        (AllToAll, {"tp": 2, "ep": 2}, {"dst": R}, 2 + 2),
        (DedupAllToAll, {"tp": 2, "ep": 2}, {}, 1 + 1),
        (DedupAllToAll, {"tp": 2, "etp": 2}, {"src": I, "dst": I, "bias": True}, 1 + 1),
        # which of the gathered slots have an expert here follows from what was read at first
        (AllGather, {"dp": 2, "ep": 2}, {}, 1 + 1),
    ],
    ids=str,
)
def test_the_host_reads_no_more_than_it_must(
    dispatcher: Any, degrees: dict[str, int], changes: dict[str, Any], reads: int
) -> None:
    """Each makes it wait for all that a device has been told to do."""
    assert threaded(2, reads_of, dispatcher, degrees, changes) == [Counter(read_ints=reads)] * 2


# --- types ------------------------------------------------------------------------------------


class Strip(ast.NodeTransformer):
    """Takes annotations out of functions. Those of fields stay: dataclasses are made of them."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        node.body = [stripped for part in node.body for stripped in self.statement(part)]
        return node

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        if not isinstance(node, ast.AnnAssign):
            return [node]
        if node.value is None:
            return [ast.copy_location(ast.Pass(), node)]
        return [ast.copy_location(ast.Assign([node.target], node.value), node)]


def functions(code: CodeType) -> Iterator[tuple[str, bytes, tuple[object, ...]]]:
    """Name, bytecode and constants of every function in a module, however deep."""
    for const in code.co_consts:
        if isinstance(const, CodeType):
            if const.co_flags & inspect.CO_OPTIMIZED:  # a function; the body of a class is not
                plain = tuple(c for c in const.co_consts if not isinstance(c, CodeType))
                yield const.co_qualname, const.co_code, plain
            yield from functions(const)


def traces(source: str) -> list[str]:
    """Functions whose bytecode or constants depend on annotations."""
    tree = ast.fix_missing_locations(Strip().visit(ast.parse(source)))
    typed = list(functions(compile(source, "typed", "exec", dont_inherit=True)))
    bare = list(functions(compile(tree, "bare", "exec", dont_inherit=True)))
    assert [name for name, *_ in typed] == [name for name, *_ in bare]
    return [a[0] for a, b in zip(typed, bare, strict=True) if a != b]


@pytest.mark.parametrize("name", LAYER)
def test_types_leave_no_trace_in_functions(name: str) -> None:
    assert traces(sources()[name]) == []


def test_annotations_are_there_to_be_stripped() -> None:
    source = sources()["layer.moe"]
    stripped = ast.unparse(Strip().visit(ast.parse(source)))
    assert "x: CallersTokens" in source and "x: CallersTokens" not in stripped
    assert list(functions(compile(source, "moe", "exec", dont_inherit=True)))


def test_the_trace_test_can_fail() -> None:
    """A function made in each call of another gets its annotations in each call."""
    lines = ["def outer(x: int) -> int:", "    y: int = x", "    return y"]
    assert traces("\n".join(lines)) == []
    lines[2:] = ["    def inner(z: int) -> int:", "        return z", "    return inner(y)"]
    assert traces("\n".join(lines)) == ["outer"]


# --- time -------------------------------------------------------------------------------------


def test_a_small_training_step_is_no_slower_than_the_loop() -> None:
    """By hand, the gradients of all experts are copied into one tensor. We need about 0.65."""
    pair = Pair(Sizes(256, 512, 32, 4), FLOAT32, 8, alone=False)
    row = Row(FLOAT32, 8, True, 1.0)
    # Other programs disturb one of the two more than the other; not five times running.
    tries = (measure(pair, row, seconds=2.0) for _ in range(5))
    assert any(took["ours"] < took["loop"] for took in tries)
