"""A model in training on real ranks, in which a bug appears at some step."""

from __future__ import annotations

from typing import TypeAlias, final
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spmd_moe import (
    DP,
    TP,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    MoEOutput,
    P,
    Placed,
    R,
    Role,
    RouterConfig,
    SanitizerError,
    V,
    init_weights,
    redistribute,
    sanitize,
    update_selection_bias,
)
from spmd_moe.core.declare_placements import declared
from spmd_moe.core.placement import DENSE, EXPERT
from spmd_moe.sanitize import Sanitizer

Hidden: TypeAlias = Placed[Tensor, DP[V], TP[I]]
LAST = 5


@final
class Block(nn.Module):
    """The same on every rank of tp: dropout, a matrix, and a layer of experts."""

    weight_DD: Placed[nn.Parameter, DP[R], TP[I]]

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        config = MoEConfig(8, 16, RouterConfig(4, 2), src=I, dst=I)
        self.mesh, self.seed, self.in_place = mesh, 0, False
        self.weight_DD = nn.Parameter(torch.empty(8, 8))
        self.moe = MoE(config, mesh)

    def forward(self, x_TD: Hidden) -> Hidden:
        x_TD = F.linear(self.dropped(x_TD), self.weight_DD)
        out: MoEOutput = self.moe(x_TD)
        return x_TD + out.hidden

    def dropped(self, x_TD: Hidden) -> Hidden:
        stream = torch.Generator().manual_seed(self.seed)
        kept_TD = torch.rand(x_TD.shape, generator=stream) > 0.1
        return x_TD.mul_(kept_TD) if self.in_place else torch.where(kept_TD, x_TD, 0.0)


@final
class Job:
    """A training loop, and the places where it can go wrong."""

    def __init__(self, bug: str, begins: int, **degrees: int) -> None:
        self.bug, self.begins = bug, begins
        self.mesh = MoEMesh.init("cpu", **degrees)
        self.model = Block(self.mesh)
        init_weights(self.model, self.mesh, seed=0, std=0.2)
        # Small steps, so that a parameter that has gone astray stays near the others.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.step = 0
        self.watcher: Sanitizer | None = None  # told when the gradients are reduced

    def has(self, bug: str) -> bool:
        return self.bug == bug and self.step >= self.begins

    def run(self, steps: int, watcher: Sanitizer | None = None) -> None:
        self.watcher = watcher
        for self.step in range(steps):
            with mock.patch("spmd_moe.layer.router.redistribute", self.gate_weight):
                self.train()

    def gate_weight(self, x: Tensor, axis: object, **how: object) -> Tensor:
        return x if self.has("router") else redistribute(x, axis, **how)  # type: ignore[arg-type]  # as it comes

    def train(self) -> None:
        mesh, model = self.mesh, self.model
        rank = mesh[DP].rank
        model.in_place = self.has("in place")
        differs = model.in_place or self.has("dropout")
        model.seed = self.step + 100 * mesh[TP].rank * differs
        self.optimizer.zero_grad()
        for micro in range(2):
            seed = torch.Generator().manual_seed(1000 * micro + 10 * self.step + rank)
            x_TD = torch.randn(6 + rank, 8, generator=seed)
            (model(x_TD).square().sum() / 100).backward()
        if self.has("ahead") and dist.get_rank() == 1:
            model.dropped(x_TD)
        self.reduce()
        if self.watcher is not None:
            self.watcher.reduced()
        self.change_gradients()
        self.optimizer.step()
        if self.has("bias") and dist.get_rank() != 1:
            model.moe.router.bias_E += 1
        update_selection_bias([model.moe.router], mesh, 0.001)

    def change_gradients(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.has("clip"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 1e-3)  # each rank by its own norm
        for gradient in gradients:
            if self.has("scale"):
                gradient *= 0.1
            if self.has("sign"):
                gradient.sign_()

    def reduce(self) -> None:
        for name, parameter, kinds in self.parameters():
            for role in kinds:
                if not (self.has("unreduced") and role == DP and name == "weight_DD"):
                    sum_over(parameter, self.mesh, role)
            if self.has("twice") or (self.has("twice one") and name == "weight_DD"):
                for role in kinds:
                    sum_over(parameter, self.mesh, role)
            if self.has("tp too") and name == "moe.router.weight_ED":
                sum_over(parameter, self.mesh, TP)
            if self.has("average") or (self.has("average one") and "experts" in name):
                assert parameter.grad is not None
                parameter.grad /= 2

    def parameters(self) -> list[tuple[str, nn.Parameter, list[Role]]]:
        """Each parameter, and the roles over which its gradient is to be summed."""
        found = []
        for prefix, module in self.model.named_modules():
            own = declared(module)
            for name, parameter in module.named_parameters(recurse=False):
                kinds = own[name]
                roles = [r for r in (*DENSE, *EXPERT) if r in kinds and kinds[r] is R]
                found.append(
                    (
                        f"{prefix}.{name}".replace("_orig_mod.", "").removeprefix("."),
                        parameter,
                        roles,
                    )
                )
        return found


def sum_over(parameter: nn.Parameter, mesh: MoEMesh, role: Role) -> None:
    assert parameter.grad is not None
    parameter.grad = redistribute(parameter.grad, mesh[role], src=P, dst=R).clone()


def told(
    bug: str, begins: int, degrees: dict[str, int], rate: float = 1.0, says: bool = False
) -> tuple[int, str]:
    """The step in which the job ended, and the error that ended it. `says`: it calls `reduced`."""
    job = Job(bug, begins, **degrees)
    try:
        with sanitize(job.model, job.mesh, rate) as watcher:
            job.run(LAST, watcher if says else None)
    except SanitizerError as error:
        return job.step, str(error)
    return LAST, ""
