"""The sanitizer on what is unlike a layer in training: other modules, other ways, other ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spmd_moe import DP, MoEMesh, Placed, R, SanitizerError, declare, sanitize
from tests.workers import run


def of_torch() -> str:
    """A class that says nothing of its parameter, whose gradient nobody sums."""
    mesh, model = MoEMesh.init("cpu", dp=2), nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    declare(model, {"weight": Placed[Tensor, DP[R]]})
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
