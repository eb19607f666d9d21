"""Whole models under FSDP2 and HSDP on real processes: the same training as in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from spmd_moe import (
    CP,
    DP,
    TP,
    I,
    MoEMesh,
    Placement,
    R,
    SpmdMoeError,
    clip_grad_norm_,
    declare_placements,
    init_weights,
    obligations,
    parallelize,
    reduce_gradients,
    update_selection_bias,
)
from spmd_moe.core.mesh import Names
from spmd_moe.layer.router import Router
from tests.support.layer_layouts import Layout
from tests.support.models import Model, batch, build, mesh_of, part
from tests.support.operator_log import operators
from tests.support.simulated_ranks import fake_world
from tests.support.workers import run

pytestmark = pytest.mark.gloo

STEPS = 3


@dataclass(frozen=True)
class Way:
    """How a model is put on the ranks."""

    layout: Layout
    own_tokens: bool = False
    fsdp: bool = True
    replicas: int = 1
    blocks: bool = True
    reshard: bool | None = None
    experts: int = 8
    micro: int = 1  # backwards before each step
    swapped: bool = False  # the user's own mesh, tp first

    def __str__(self) -> str:
        changed = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(Way(self.layout), name)
        ]
        return " ".join([str(self.layout), *changed])


BIG = Layout(dp=4, tp=2, ep=2, etp=2)
SMALL = Layout(dp=2, tp=2, ep=2, etp=2)
WAYS = [
    Way(BIG),
    Way(BIG, replicas=2, own_tokens=True),
    Way(Layout(dp=8, ep=2), experts=6, reshard=True),  # three experts for four shards
    Way(Layout(dp=4, ep=4), own_tokens=True),
    Way(Layout(dp=2, cp=2, ep=2), replicas=2, micro=2),
    Way(Layout(tp=4, ep=2, etp=2), reshard=False),
    Way(Layout(tp=4, ep=4), own_tokens=True, blocks=False),
    Way(SMALL, micro=2, own_tokens=True),
    Way(SMALL, swapped=True),
    Way(SMALL, fsdp=False, micro=2),
]


def on_ranks(way: Way, dtype: torch.dtype = torch.float64, **how: Any) -> tuple[Model, MoEMesh]:
    layout = way.layout
    if way.swapped:
        names: dict[str, Names] = {"tp": "across", "dp": "along"}
        theirs = init_device_mesh("cpu", (layout.tp, layout.dp), mesh_dim_names=("across", "along"))
        mesh = MoEMesh.from_device_mesh(theirs, **names, ep=layout.ep, etp=layout.etp)  # type: ignore[arg-type]  # names are strings
    else:
        mesh = mesh_of(layout)
    model = build(mesh, way.own_tokens, dtype, way.experts)
    if way.fsdp and layout.world > 1:
        blocks = model.blocks if way.blocks else ()
        how = {"replicas": way.replicas, "reshard_after_forward": way.reshard} | how
        parallelize(model, mesh, blocks=blocks, **how)
    return model, mesh


def train(model: Model, mesh: MoEMesh, way: Way) -> list[float]:
    """A few steps as a user writes them; the norms of the gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    norms = []
    for step in range(STEPS):
        for micro in range(way.micro):
            model(*batch(mesh, way.own_tokens, step * way.micro + micro)).backward()
        if not isinstance(next(model.parameters()), DTensor):
            reduce_gradients(model, mesh)
        norms.append(float(clip_grad_norm_(model, mesh, 0.2)))
        optimizer.step()
        optimizer.zero_grad()
        routers = [module for module in model.modules() if isinstance(module, Router)]
        update_selection_bias(routers, mesh, 0.01)
    return norms


def held(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's shard of what it computes with, by the rule of FSDP."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    axis = (mesh.mesh_dim_names or ()).index("shard")
    dim = parameter.placements[axis].dim  # type: ignore[attr-defined]  # a shard has one
    shards, rank = whole.chunk(mesh.size(axis), dim), mesh.get_local_rank(axis)
    return shards[rank] if rank < len(shards) else whole.narrow(dim, 0, 0)


def trained(way: Way, want: dict[str, Tensor]) -> tuple[float, list[float]]:
    """How far this rank's parameters are off after training, and the norms it saw."""
    model, mesh = on_ranks(way)
    norms = train(model, mesh, way)
    off, state = 0.0, model.state_dict()
    for row in obligations(model, mesh):
        if row.name.endswith("seen_E"):
            continue
        theirs = held(state[row.name], part(want[row.name], row.placement, mesh))
        mine = state[row.name]
        mine = mine.to_local() if isinstance(mine, DTensor) else mine
        assert mine.shape == theirs.shape
        off = max([off, *(mine - theirs).abs().flatten().tolist()])
    return off, norms


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_training_is_that_of_one_process(way: Way) -> None:
    model, mesh = on_ranks(replace(way, layout=Layout(), swapped=False))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    norms = train(model, mesh, way)
    after = {name: t.clone() for name, t in model.state_dict().items()}
    moved = [name for name in after if torch.equal(before[name], after[name])]
    assert min(norms) > 0.2 and all(name.endswith("seen_E") for name in moved), "nothing to compare"
    for off, theirs in run(way.layout.world, trained, way, after):
        assert off < 1e-12
        assert theirs == pytest.approx(norms, rel=1e-10)


# --- how it is stored, and what it computes with ------------------------------------------------


def placements(way: Way) -> dict[str, str]:
    model, _ = on_ranks(way)
    return {
        name: " ".join(str(p) for p in parameter.placements)
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }


def test_storage_follows_from_the_placement() -> None:
    with fake_world(8):
        stored = placements(Way(BIG))
        replicated = placements(Way(BIG, replicas=2))
        uneven = placements(Way(Layout(dp=8, ep=2), experts=6))
    experts = "blocks.0.moe.experts."
    assert stored[f"{experts}w1_eFD"] == "_S(0, 2) S(0) S(1)"
    assert stored[f"{experts}w2_eDF"] == "_S(0, 2) S(0) S(2)"
    assert stored["blocks.0.moe.router.weight_ED"] == "S(0) R"
    assert replicated[f"{experts}w1_eFD"] == "R _S(0, 2) S(0) S(1)"
    assert replicated["head.bias"] == "R S(0) R"
    assert uneven[f"{experts}w1_eFD"] == "S(1) S(0)"


def test_shards_are_the_ranks_that_owe_each_other() -> None:
    """Also where they are not adjacent: cp stands between dp and tp."""
    with fake_world(8):
        mesh, model = MoEMesh.init("cpu", dp=2, cp=2, tp=2), nn.Linear(8, 8, bias=False)
        declare_placements(model, {"*": Placement((DP[R], CP[I], TP[R]))})
        parallelize(model, mesh)
        stored = model.weight
        assert isinstance(stored, DTensor)
        assert stored.device_mesh.mesh.tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
        assert stored.device_mesh.mesh_dim_names == ("shard", "cp")


def computed_with(way: Way) -> tuple[dict[str, str], float, set[torch.dtype]]:
    """The parameters that a layer sees while it runs; the loss; the dtypes of the gradients."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, mesh = on_ranks(way, torch.float32, policy=policy)
    seen: dict[str, str] = {}

    def look(layer: nn.Module, *_: object) -> None:
        for name, parameter in layer.named_parameters():
            assert not isinstance(parameter, DTensor)
            seen[name] = f"{parameter.dtype} {list(parameter.shape)}"

    model.get_submodule("blocks.0.moe").register_forward_hook(look)
    loss = model(*batch(mesh, way.own_tokens))
    with operators() as ran:
        loss.backward()
    assert {op.dtype for op in ran if "_reduce_scatter_base_" in op.name} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return (
        seen,
        float(loss.detach()),
        {p.grad.dtype for p in model.parameters() if p.grad is not None},
    )


def test_compute_is_plain_and_in_the_precision_of_the_policy() -> None:
    way = Way(SMALL)
    model, mesh = on_ranks(replace(way, layout=Layout()))
    want = float(model(*batch(mesh, False)).detach())
    by_rank = run(4, computed_with, way)
    for seen, _, dtypes in by_rank:
        assert seen["experts.w1_eFD"] == "torch.bfloat16 [4, 8, 8]"
        assert seen["router.weight_ED"] == "torch.bfloat16 [8, 8]"
        assert dtypes == {torch.float32}
    losses = [loss for _, loss, _ in by_rank]
    assert losses[0] + losses[2] == pytest.approx(want, rel=0.05)


# --- refusals that need several ranks -----------------------------------------------------------


def other_settings(way: Way) -> list[str]:
    model, said = build(mesh := mesh_of(way.layout), False), []
    other = bool(torch.distributed.get_rank())
    settings: list[dict[str, Any]] = [
        {"replicas": 1 + other},
        {"blocks": list(model.blocks)[other:]},
        {"reshard_after_forward": other},
    ]
    for setting in settings:
        try:
            parallelize(model, mesh, **setting)
        except SpmdMoeError as error:
            said.append(str(error).splitlines()[0])
    if other:
        model.get_submodule("blocks.1.norm").weight = nn.Parameter(torch.ones(3))
    with pytest.raises(SpmdMoeError) as caught:
        parallelize(model, mesh)
    return [*said, str(caught.value).splitlines()[0]]


def test_ranks_that_disagree_are_told() -> None:
    for of_rank in run(2, other_settings, Way(Layout(dp=2))):
        replicas, blocks, reshard, parameter = of_rank
        head = "parallelize: the ranks were called with different settings: "
        assert replicas == f"{head}replicas=1 on ranks [0] | replicas=2 on ranks [1]."
        assert blocks.startswith(f"{head}blocks=['blocks.0', 'blocks.1'] on ranks [0]")
        assert "reshard_after_forward=False on ranks [0]" in reshard
        assert parameter.startswith(f"{head}blocks.1.norm.weight=[8] ")
        assert " | blocks.1.norm.weight=[3] " in parameter and "moe" not in parameter


# --- made on no device --------------------------------------------------------------------------


def unlike_the_usual(way: Way) -> list[str]:
    """What differs, to the bit, once a model that was made on the meta device has been trained."""
    mesh = mesh_of(way.layout)
    with torch.device("meta"):
        model = Model(mesh, way.own_tokens, way.experts).to(torch.float64)
    if way.fsdp:
        parallelize(model, mesh, blocks=model.blocks, replicas=way.replicas)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.1)  # what memory may hold
        model(*batch(mesh, way.own_tokens))  # after which FSDP has other parameters in their place
    init_weights(model, mesh, seed=0, std=0.3)
    usual, _ = on_ranks(way)
    found, want = model.state_dict(), usual.state_dict()
    unlike = [f"{name} at first" for name in want if not _same(found[name], want[name])]
    norms = train(model, mesh, way), train(usual, mesh, way)
    found, want = model.state_dict(), usual.state_dict()
    unlike += [f"{name} trained" for name in want if not _same(found[name], want[name])]
    return unlike if norms[0] == norms[1] else [*unlike, "norms"]


def _same(a: Tensor, b: Tensor) -> bool:
    kinds = [t.placements if isinstance(t, DTensor) else None for t in (a, b)]
    a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (a, b))
    return kinds[0] == kinds[1] and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(
    "way",
    [
        Way(Layout(dp=2, tp=2, ep=2, etp=2)),
        Way(Layout(dp=4, ep=2), replicas=2, own_tokens=True),
        Way(Layout(dp=2, tp=2, ep=4), fsdp=False),
    ],
    ids=str,
)
def test_from_the_meta_device_as_from_any_other(way: Way) -> None:
    assert run(4, unlike_the_usual, way) == [[]] * 4
