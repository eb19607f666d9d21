"""Input that one rank alone refuses: it says why, and ranks that would wait raise too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spmd_moe import (
    AllGather,
    AllToAll,
    DedupAllToAll,
    Dispatcher,
    I,
    Kind,
    MoE,
    MoEConfig,
    MoEMesh,
    R,
    RouterConfig,
    S,
    SharedConfig,
    SpmdMoeError,
    init_weights,
    parallelize,
)
from spmd_moe.check.signatures import checked, signatures
from spmd_moe.check.thread_ranks import threaded
from tests.support.layer_runs import declare_all
from tests.support.workers import run

CONFIG = MoEConfig(6, 12, RouterConfig(6, 2))
X, MASK = torch.ones(3, 6), torch.ones(3, dtype=torch.bool)
IDS = torch.zeros(3, 2, dtype=torch.int64)
BAD: dict[str, tuple[Any, Any, Any]] = {
    "width": (torch.ones(3, 5), None, None),
    "dims": (torch.ones(6), None, None),
    "dtype": (X.double(), None, None),
    "device": (X.to("meta"), None, None),
    "no tensor": ([[1.0] * 6], None, None),
    "layout": (X.to_sparse(), None, None),
    "mask's shape": (X, MASK[:2], None),
    "mask's dtype": (X, MASK.long(), None),
    "ids' shape": (X, None, IDS[:, :1]),
    "ids' dtype": (X, MASK, IDS.float()),
}


def told(layer: MoE, bad: str, at_fault: bool) -> list[str]:
    """The class and the first line of the error; then, whether the layer still works."""
    before, said = layer(X, MASK, IDS).hidden, ["nothing", ""]
    try:
        layer(*(BAD[bad] if at_fault else (X, MASK, IDS)))
    except SpmdMoeError as error:
        said = [type(error).__name__, str(error).splitlines()[0]]
    after: Tensor = layer(X, MASK, IDS).hidden
    return [*said, "as before" if torch.equal(after, before) else "broken"]


def made(
    degrees: dict[str, int],
    config: MoEConfig = CONFIG,
    dispatcher: Callable[[MoEMesh, int], Dispatcher[Any]] | None = None,
) -> MoE:
    mesh = MoEMesh.init("cpu", **degrees)
    layer = MoE(config, mesh, dispatcher and dispatcher(mesh, config.router.num_experts))
    init_weights(layer, mesh, seed=0)
    return layer


def in_a_dispatch(
    dispatcher: Callable[[MoEMesh, int], Dispatcher[Any]], degrees: dict[str, int]
) -> list[list[str]]:
    layer = made(degrees, CONFIG, dispatcher)
    return [told(layer, bad, dist.get_rank() == 1) for bad in BAD]


@pytest.mark.parametrize("dispatcher", [AllToAll, DedupAllToAll, AllGather])
@pytest.mark.parametrize(
    ("degrees", "who"),
    [
        ({"dp": 3, "ep": 3}, "1 of 3 ranks (etp 0 ep 1)"),
        ({"dp": 2, "tp": 2, "ep": 2, "etp": 2}, "1 of 4 ranks (etp 1 ep 0)"),
    ],
    ids=str,
)
def test_all_whom_a_dispatch_reaches_raise(
    dispatcher: Any, degrees: dict[str, int], who: str
) -> None:
    world = degrees["dp"] * degrees.get("tp", 1)
    first, own, *others = threaded(world, in_a_dispatch, dispatcher, degrees)
    for name, text, after in own:
        assert name in ("ShapeError", "DtypeError", "ConfigError") and after == "as before"
        assert text.startswith("MoE.forward: ") and "refused" not in text
    heard = ["RoutingError", f"MoE.forward: the input was refused on {who}.", "as before"]
    assert all(other == [heard] * len(BAD) for other in (first, *others))


def where_tokens_are_gathered(
    degrees: dict[str, int], src: Kind, dst: Kind, sharded: bool
) -> list[str]:
    shared = SharedConfig(8, sharded=True) if sharded else None
    layer = made(degrees, replace(CONFIG, src=src, dst=dst, shared=shared))
    return told(layer, "width", dist.get_rank() == dist.get_world_size() - 1)


# The last is of groups that hang together as in a chain: ranks 0 1 2 and 3 4 5 have the experts,
# 0 1 and 2 3 and 4 5 the same tokens. Rank 2 waits for 3, which waits for 5.
@pytest.mark.parametrize(
    "degrees",
    [{"tp": 2}, {"tp": 4, "ep": 2}, {"dp": 3, "tp": 2, "ep": 3}, {"cp": 3, "tp": 2, "etp": 3}],
    ids=str,
)
@pytest.mark.parametrize(
    ("src", "dst", "sharded"),
    [(I, I, False), (R, S(0), False), (S(0), R, False), (S(0), S(0), True)],
    ids=str,
)
def test_all_ranks_raise_where_tokens_are_gathered(
    degrees: dict[str, int], src: Kind, dst: Kind, sharded: bool
) -> None:
    world = degrees["tp"] * degrees.get("dp", 1) * degrees.get("cp", 1)
    *others, own = threaded(world, where_tokens_are_gathered, degrees, src, dst, sharded)
    assert own[0] == "ShapeError" and "dim 6" in own[1] and own[2] == "as before"
    for name, text, after in others:
        assert name == "RoutingError" and after == "as before"
        assert text.startswith("MoE.forward: the input was refused on ")


@pytest.mark.gloo
def test_processes_raise() -> None:
    first, own, *others = run(4, in_a_dispatch, AllToAll, {"dp": 4, "ep": 2})
    assert {name for name, _, _ in own} == {"ShapeError", "DtypeError", "ConfigError"}
    assert {name for name, _, _ in first} == {"RoutingError"}
    assert all(after == "as before" for _, _, after in own + first)
    assert others == [[["nothing", "", "as before"]] * len(BAD)] * 2  # of another group of ep


def stored(blocks: str) -> list[list[str]]:
    """A layer of which FSDP gathers some parts by themselves, just before they run."""
    layer = made({"dp": 2, "ep": 2})
    parts = {"experts": layer.experts, "router": layer.router}
    parallelize(layer, layer.mesh, blocks=[parts[name] for name in blocks.split()])
    return [told(layer, bad, dist.get_rank() == 1) for bad in ("dtype", "width")]


@pytest.mark.gloo
@pytest.mark.parametrize("blocks", ["router", "experts", "experts router"])
def test_stored_layers_raise(blocks: str) -> None:
    first, own = run(2, stored, blocks)
    assert [name for name, _, _ in own] == ["DtypeError", "ShapeError"]
    assert {name for name, _, _ in first} == {"RoutingError"}
    assert {after for _, _, after in first + own} == {"as before"}


def typed(dispatcher: Any, degrees: dict[str, int], src: Kind, bad: str) -> list[str]:
    layer = made(degrees, replace(CONFIG, src=src, dst=src), dispatcher)
    inputs = BAD[bad] if dist.get_rank() == 1 else (X, MASK, IDS)
    given: list[Any] = [
        None if x is None else x.clone() for x in inputs
    ]  # kinds belong to a tensor
    declare_all(layer, given)
    with checked(layer.mesh):
        try:
            layer(*given)
        except SpmdMoeError as error:
            return [type(error).__name__, str(error).splitlines()[0]]
    return ["nothing", ""]


@pytest.mark.parametrize("bad", ["width", "mask's dtype", "dtype"])
@pytest.mark.parametrize(
    ("dispatcher", "degrees", "src"),
    [
        (AllToAll, {"dp": 2, "ep": 2}, S(0)),
        (AllGather, {"dp": 2, "ep": 2}, S(0)),
        (AllToAll, {"tp": 2, "ep": 2}, R),
        (None, {"tp": 2}, I),
    ],
    ids=str,
)
def test_all_raise_under_the_strict_checker(
    dispatcher: Any, degrees: dict[str, int], src: Kind, bad: str
) -> None:
    with signatures(["spmd_moe"]):
        (name, text), own = threaded(2, typed, dispatcher, degrees, src, bad)
    assert own[0] in ("ShapeError", "DtypeError") and own[1].startswith("MoE.forward: ")
    assert name == "RoutingError" and text.startswith("MoE.forward: the input was refused on ")
