"""The sanitizer on what is unlike a layer in training: other modules, other ways, other ends."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from spmd_moe import (
    DP,
    TP,
    ConfigError,
    MoEMesh,
    Placed,
    R,
    SanitizerError,
    declare_placements,
    sanitize,
)
from tests.support.workers import run
from tests.support.wrong_results import WRONG, Model


class Norm(nn.Module):
    """Without parameters."""

    def forward(self, x_TD: Placed[Tensor, DP[R]]) -> Placed[Tensor, DP[R]]:
        return x_TD / x_TD.norm()


def of_torch() -> str:
    """A class that says nothing of its parameter, whose gradient is not summed."""
    mesh, model = MoEMesh.init("cpu", dp=2), nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    declare_placements(model, {"weight": Placed[Tensor, DP[R]]})
    optimizer = torch.optim.SGD(model.parameters())
    try:
        with sanitize(model, mesh, 1.0):
            model(torch.full((1, 4), 1.0 + mesh[DP].rank)).sum().backward()
            optimizer.step()
    except SanitizerError as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_what_is_declared_by_name_is_watched() -> None:
    for text in run(2, of_torch):
        assert text.startswith("'weight': gradient f32[4, 4] is R on axis 'dp' (2 ranks)")


class Rows(nn.Module):
    """A DTensor weight, and rows that differ between ranks: its gradient is Partial if `typed`."""

    def __init__(self, mesh: DeviceMesh, typed: bool) -> None:
        super().__init__()
        weight = DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()])
        self.weight, self.typed = nn.Parameter(weight), typed

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        assert isinstance(weight, DTensor)
        if self.typed:
            rows = DTensor.from_local(x, weight.device_mesh, [Shard(0)])
            out = rows @ weight
            assert isinstance(out, DTensor)
            return out.to_local()
        return x @ weight.to_local()  # whose backward takes the gradient for the whole


def of_dtensors() -> list[str]:
    """Gradients that say that they are Partial, and gradients that wrongly say nothing."""
    mesh, found = MoEMesh.init("cpu", tp=2), []
    for typed in (True, False):
        model = Rows(init_device_mesh("cpu", (2,)), typed)
        declare_placements(model, {"weight": Placed[Tensor, TP[R]]})
        optimizer = torch.optim.SGD(model.parameters())
        try:
            with sanitize(model, mesh, 1.0):
                model(torch.full((1, 4), 1.0 + mesh[TP].rank)).sum().backward()
                optimizer.step()
            found.append("")
        except SanitizerError as error:
            found.append(str(error))
    return found


@pytest.mark.gloo
def test_gradients_that_are_partial_dtensors_may_differ() -> None:
    for partial, unsummed in run(2, of_dtensors):
        assert partial == ""
        assert unsummed.startswith("'weight': gradient f32[4, 4] is R on axis 'tp' (2 ranks)")


def one_rank_alone(rate: float) -> str:
    """Rank 0 runs the model, rank 1 leaves at once."""
    mesh, norm = MoEMesh.init("cpu", dp=2), Norm()
    try:
        with sanitize(norm, mesh, rate) as watcher:
            watcher.step()
            if dist.get_rank() == 0:
                norm(torch.ones(2, 4))
    except SanitizerError as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_a_rank_that_leaves_early_waits_for_no_one() -> None:
    for text in run(2, one_rank_alone, 1.0):
        assert text.startswith(
            "sanitize: in step 1 the ranks diverge at boundary 0: Norm.forward, "
        )
        assert "Norm.forward, argument x_TD on ranks [0] | nothing more on ranks [1]" in text
    assert run(2, one_rank_alone, 0.5) == ["", ""]  # that step is not watched


def of_wrong_results() -> list[str]:
    """What the sanitizer reports for each function of `wrong_results`."""
    mesh, found = MoEMesh.init("cpu", tp=2), []
    for function in WRONG:
        try:
            with sanitize(Model(function), mesh, 1.0) as watcher:
                watcher.model(torch.full((2, 8), 1.0 + mesh[TP].rank))
        except SanitizerError as error:
            found.append(str(error).splitlines()[0])
    return found


@pytest.mark.gloo
def test_a_wrong_tensor_is_found_in_every_container() -> None:
    form = "f32[2, 8] is R on axis 'tp' (2 ranks)"
    want = [f"{name}: {path} {form}" for name, path in WRONG.values()]
    for found in run(2, of_wrong_results):
        assert [line.partition(", but")[0] for line in found] == want


def test_a_wrong_rate_is_told_where_it_is_given() -> None:
    """Not in contextlib, which enters the context."""
    mesh = MoEMesh.single()
    here = pytest.raises(ConfigError, match=r"at:  .*test_sanitizer_edges\.py:\d+$")
    with here, sanitize(nn.Linear(1, 1), mesh, rate=2):
        pass
