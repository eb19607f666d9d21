"""What whole models are refused for: the cases of `test_errors.py` that need one."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed.tensor as torch_tensor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from spmd_moe import (
    CP,
    DP,
    EDP,
    EP,
    TP,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    Placement,
    R,
    RouterConfig,
    S,
    V,
    clip_grad_norm_,
    declare_placements,
    init_weights,
    obligations,
    parallelize,
    recompute,
    reduce_gradients,
)
from spmd_moe.core import spmd_types_compat
from spmd_moe.core.placement import RoleKind, SharedWeight, Whole
from tests.support.refused_hf import BAD_HF
from tests.support.simulated_ranks import fake_world


def owing(*kinds: RoleKind) -> Callable[[], object]:
    """The obligations of a module that is declared to be of these kinds."""

    def act() -> object:
        model = nn.Linear(2, 2, bias=False)
        declare_placements(model, {"weight": Placement(kinds)})
        return obligations(model, MoEMesh.single())

    return act


def given(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    """A layer that is given what is made of tokens."""

    def act() -> object:
        with fake_world(2):
            layer = MoE(MoEConfig(4, 8, RouterConfig(8, 2)), MoEMesh.init("cpu", dp=2))
            init_weights(layer, layer.mesh, seed=0)
            return layer(make(torch.ones(3, 4)))

    return act


def as_dtensor(x: torch.Tensor) -> torch.Tensor:
    return DTensor.from_local(x, init_device_mesh("cpu", (2,)))


TOKENS = torch.ones(3, 4)


def small_layer() -> MoE:
    layer = MoE(MoEConfig(4, 8, RouterConfig(8, 2)), MoEMesh.single())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.5)
    return layer


def batched_backward() -> None:
    x = TOKENS.clone().requires_grad_()
    y = small_layer()(x).hidden
    torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)


def tied() -> object:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    declare_placements(model, {"0.weight": SharedWeight, "1.weight": Whole})
    return obligations(model, MoEMesh.single())


def cut_by_others() -> None:
    """What each rank would then be given are the first rows."""
    with fake_world(2):
        mesh, model = MoEMesh.init("cpu", dp=2), nn.Linear(2, 4, bias=False)
        declare_placements(model, {"weight": SharedWeight})
        fully_shard(model, mesh=mesh.dense["dp"])
        init_weights(model, mesh, seed=0)


def with_gradient(value: float = 1.0) -> nn.Module:
    model = nn.Linear(2, 2, bias=False)
    declare_placements(model, {"weight": SharedWeight})
    model.weight.grad = torch.full((2, 2), value)
    return model


def twice() -> None:
    model = with_gradient()
    reduce_gradients(model, MoEMesh.single())
    reduce_gradients(model, MoEMesh.single())


def not_finite() -> None:
    clip_grad_norm_(with_gradient(torch.inf), MoEMesh.single(), 1.0, error_if_nonfinite=True)


def unreduced() -> None:
    with fake_world(2):
        clip_grad_norm_(with_gradient(), MoEMesh.init("cpu", dp=2), 1.0)


def stored() -> None:
    """As after `parallelize`."""
    with fake_world(2):
        mesh, model = MoEMesh.init("cpu", dp=2), with_gradient()
        whole = DTensor.from_local(torch.ones(1, 2), mesh.dense[DP.name], [torch_tensor.Shard(0)])
        model.register_parameter("weight", nn.Parameter(whole))
        reduce_gradients(model, mesh)


def parallel(
    *kinds: RoleKind,
    rows: int = 8,
    degrees: dict[str, int] | None = None,
    foreign: bool = False,
    twice: bool = False,
    replicas: int = 1,
    policy: MixedPrecisionPolicy | None = None,
) -> Callable[[], object]:
    """A linear module with these kinds, on eight ranks."""

    def act() -> object:
        with fake_world(8):
            mesh = MoEMesh.init("cpu", **(degrees or {"dp": 4, "tp": 2}))
            model = nn.Sequential(nn.Linear(7, rows, bias=False))
            declare_placements(model, {"*": Placement(kinds or (DP[R], CP[R], TP[I]))})
            blocks = [nn.Linear(2, 2)] if foreign else []
            for _ in range(2 if twice else 1):
                parallelize(model, mesh, blocks=blocks, replicas=replicas, policy=policy)
            return None

    return act


def part_of_the_ranks() -> None:
    with fake_world(8):
        users = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))["dp", "tp"]
        experts = init_device_mesh("cpu", (2, 4), mesh_dim_names=("pp", "ep"))["ep"]
        mesh = MoEMesh.from_device_mesh(users, dp="dp", tp="tp", expert=experts, ep="ep")
        parallelize(with_gradient(), mesh)


def with_old_spmd_types() -> None:
    """As `run_checks` begins, beside a version without typing rules."""
    with (
        mock.patch.object(spmd_types_compat, "HAS_RULES", False),
        mock.patch.object(spmd_types_compat, "version", lambda name: "0.2.3"),
    ):
        spmd_types_compat.require_rules("check")


BAD_MODELS: dict[str, Callable[[], object]] = {
    "spmd_types_too_old": with_old_spmd_types,
    "init_of_fully_shard": cut_by_others,
    "moe_x_dtensor": given(as_dtensor),
    "moe_x_layout": given(torch.Tensor.to_sparse),
    "declare_nothing": lambda: declare_placements(nn.Linear(2, 2), {"wieght": SharedWeight}),
    "declare_twice": lambda: declare_placements(
        nn.Linear(2, 2), {"*": SharedWeight, "bias": SharedWeight}
    ),
    "declare_no_placement": lambda: declare_placements(nn.Linear(2, 2), {"*": torch.Tensor}),
    "obligations_undeclared": lambda: obligations(nn.Linear(2, 2), MoEMesh.single()),
    "obligations_missing_axis": owing(DP[R], TP[I]),
    "obligations_both_meshes": owing(EDP[R], EP[R], TP[I]),
    "obligations_varying": owing(DP[R], CP[R], TP[V]),
    "obligations_no_such_dim": owing(DP[R], CP[R], TP[S(2)]),
    "obligations_tied": tied,
    "moe_transformed": lambda: torch.func.grad(lambda x: small_layer()(x).hidden.sum())(TOKENS),
    "experts_batched": batched_backward,
    "recompute_no_list": lambda: recompute(nn.Linear(2, 2)),  # type: ignore[arg-type]  # wrong on purpose
    "recompute_no_modules": lambda: recompute(["blocks"]),  # type: ignore[list-item]  # wrong on purpose
    "reduce_twice": twice,
    "obligations_no_mesh": lambda: obligations(nn.Linear(2, 2), None),  # type: ignore[arg-type]  # wrong on purpose
    "reduce_no_mesh": lambda: reduce_gradients(nn.Linear(2, 2), None),  # type: ignore[arg-type]  # wrong on purpose
    "reduce_stored": stored,
    "parallelize_foreign_block": parallel(foreign=True),
    "parallelize_twice": parallel(twice=True),
    "parallelize_nothing_shared": parallel(DP[I], CP[I], TP[I]),
    "parallelize_replicas": parallel(replicas=3),
    "parallelize_no_mesh": lambda: parallelize(nn.Linear(2, 2), None),  # type: ignore[arg-type]  # wrong on purpose
    "parallelize_output_dtype": parallel(policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16)),
    "parallelize_no_even_dim": parallel(DP[R], CP[R], TP[S(0)], rows=3),
    "parallelize_part_of_the_ranks": part_of_the_ranks,
    "clip_norm_type": lambda: clip_grad_norm_(nn.Sequential(), MoEMesh.single(), 1.0, 0.0),
    "clip_no_mesh": lambda: clip_grad_norm_(nn.Linear(2, 2), None, 1.0),  # type: ignore[arg-type]  # wrong on purpose
    "clip_not_finite": not_finite,
    "clip_unreduced": unreduced,
    **BAD_HF,
}
