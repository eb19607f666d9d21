"""The values that a model begins with."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.declare_placements import declare_placements
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import Whole, placement_of
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import MoEConfig, SharedConfig
from spmd_moe.train.init_weights import init_weights
from tests.layer.test_counters import CONFIG, single
from tests.support.layer_layouts import Layout, part
from tests.support.layer_runs import placements

# Shape letters in this file:
#   D  model width    F  expert width    e  experts on this rank


def whole_config(sharded: bool) -> MoEConfig:
    shared = SharedConfig(8, gated=True, sharded=sharded)
    return replace(CONFIG, bias=True, shared=shared)


def initial(config: MoEConfig, mesh: MoEMesh, seed: int) -> dict[str, Tensor]:
    """The way of a layer that is too large to exist twice: described, allocated, then filled."""
    with torch.device("meta"):
        layer = MoE(config, mesh)
    assert all(value.is_meta for value in layer.state_dict().values())
    layer.to_empty(device="cpu")
    for value in (*layer.parameters(), *layer.buffers()):
        value.detach().fill_(7)  # what memory held before
    init_weights(layer, mesh, seed)
    return layer.state_dict()


def initial_on_rank(layout: Layout, config: MoEConfig, seed: int) -> dict[str, Tensor]:
    lay = layout
    mesh = MoEMesh.init("cpu", dp=lay.dp, cp=lay.cp, tp=lay.tp, ep=lay.ep, etp=lay.etp)
    return initial(config, mesh, seed)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, ep=2),
        Layout(dp=4, ep=4),
        Layout(dp=2, etp=2),
        Layout(tp=2),
        Layout(dp=2, tp=2, ep=2, etp=2),
        Layout(cp=2, tp=4, ep=2, etp=2),
    ],
    ids=str,
)
def test_initial_values_depend_on_the_seed_and_the_row_alone(layout: Layout, sharded: bool) -> None:
    config = whole_config(sharded)
    whole = initial(config, MoEMesh.single(), seed=4)
    declared = placements(MoE(config, MoEMesh.single()))
    by_rank = threaded(layout.world, initial_on_rank, layout, config, 4)
    for rank, state in enumerate(by_rank):
        assert state.keys() == whole.keys() <= declared.keys()
        for name, value in state.items():
            assert torch.equal(value, part(whole[name], declared[name], layout, rank)), name


def test_every_row_has_a_stream_of_its_own() -> None:
    state = initial(whole_config(False), MoEMesh.single(), seed=4)
    other = initial(whole_config(False), MoEMesh.single(), seed=5)
    for name, value in state.items():
        last = name.rpartition(".")[2]
        if last.startswith(("b", "seen")):
            assert value.count_nonzero() == 0, name
            continue
        rows = value.flatten(1)
        assert rows.unique(dim=0).shape == rows.shape, f"{name} has a row twice"
        assert not torch.isin(value, other[name]).any(), f"{name} is the same for another seed"
    firsts = [value.flatten()[0].item() for n, value in state.items() if ".w" in n]
    assert len(set(firsts)) == len(firsts) == 7


def test_layers_of_a_model_begin_with_values_of_their_own() -> None:
    layers = torch.nn.ModuleList([single(), single()])
    init_weights(layers, MoEMesh.single(), seed=0)
    for name, value in layers[0].named_parameters():
        assert not torch.isin(value, layers[1].get_parameter(name)).any(), name


def test_initial_values_have_the_spread_that_is_asked_for() -> None:
    mesh, layer = MoEMesh.single(), single(replace(CONFIG, dim=64))
    init_weights(layer, mesh, seed=0, std=0.02)
    w1_eFD = layer.experts.w1_eFD.detach()
    assert w1_eFD.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(w1_eFD.mean().item()) < 0.001


class Named(nn.Module):
    beta: Whole
    bias: Whole
    b1_eF: Whole

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.bias, self.b1_eF = (nn.Parameter(torch.ones(3)) for _ in range(3))


def test_biases_are_known_by_their_names() -> None:
    named = Named()
    init_weights(named, MoEMesh.single(), seed=0)
    alive = {name: bool(p.any()) for name, p in named.named_parameters()}
    assert alive == {"beta": True, "bias": False, "b1_eF": False}


class Scaled(nn.Module):
    """A layer inside a model that has a buffer and a number of its own."""

    angles_D: Whole
    scale: Whole

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles_D", torch.arange(4.0))
        self.scale = nn.Parameter(torch.ones(()))
        self.moe = single()


def test_other_buffers_are_left_alone_and_a_single_number_is_drawn() -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = Scaled()
        for buffer in (model.moe.router.bias_E, model.moe.router.seen_E):
            buffer.fill_(7)
        init_weights(model, MoEMesh.single(), seed)
        assert model.angles_D.tolist() == [0, 1, 2, 3]
        assert not model.moe.router.bias_E.any() and not model.moe.router.seen_E.any()
        drawn.append(model.scale.item())
    assert drawn[0] == drawn[1] != drawn[2] and 0 < abs(drawn[0]) < 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, in its own code
def test_initial_values_do_not_depend_on_wrappers_nor_on_the_default_dtype() -> None:
    layer, mesh = MoE(CONFIG, MoEMesh.single()), MoEMesh.single()
    init_weights(layer, mesh, seed=3)
    want = [parameter.clone() for parameter in layer.parameters()]
    torch.set_default_dtype(torch.float64)
    try:
        init_weights(checkpoint_wrapper(layer), mesh, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, layer.parameters(), want)) and want[0].any()
    init_weights(cast(nn.Module, torch.compile(layer)), mesh, seed=3)
    assert all(map(torch.equal, layer.parameters(), want))


def test_norms_and_biases_of_modules_of_others() -> None:
    """Whose names for a bias are many; a norm that scales by next to nothing would train badly."""
    mesh = MoEMesh.single()
    model = nn.ModuleDict(
        {
            "layer_norm": nn.LayerNorm(8),
            "rms_norm": nn.RMSNorm(8),
            "attention": nn.MultiheadAttention(8, 2),
            "gru": nn.GRU(8, 8),
            "linear": nn.Linear(8, 8),
        }
    )
    declare_placements(model, {"*": placement_of(Whole)})
    init_weights(model, mesh, seed=0)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.01 < parameter.std() < 0.03, name
