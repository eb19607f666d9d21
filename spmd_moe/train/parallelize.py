"""A whole model under FSDP2 or HSDP: every parameter cut over the axes that reduce its gradient.

Storage is DTensor: the optimizer and checkpoints see each parameter as a part of a whole. Compute
is the plain tensor that the layer's types speak of: FSDP gathers what the ranks of the data axes
share, and nothing else. Gradients are summed, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as StoredShard

from spmd_moe.core.errors import ConfigError, DtypeError, explain, short_dtype
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.train.obligations import Obligation, Obligations, obligations
from spmd_moe.train.storage_mesh import Store, Stores, shard_dim

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: MoEMesh,
    *,
    blocks: Iterable[nn.Module] = (),
    replicas: int = 1,
    policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | None = None,
) -> Model:
    """Store the model's parameters over the data axes by FSDP2 or HSDP, in place.

    Call it once, on every rank, before the optimizer is made. Experts are sharded over edp, all
    other parameters over dp and cp. Gradients are summed, in float32 or wider unless the policy's
    `reduce_dtype` says otherwise.

    Args:
        model: The model; every parameter must have a placement.
        mesh: The mesh.
        blocks: Modules that are gathered when they run; the rest of the model is one unit.
        replicas: The number of HSDP replicas; 1 is FSDP2.
        policy: FSDP2's mixed precision. Its `output_dtype` must be float32 or wider.
        reshard_after_forward: As in FSDP2.

    Returns:
        The model.

    Raises:
        ConfigError: `blocks` are not modules of the model, `replicas` does not divide the data
            ranks, or a parameter cannot be sharded evenly.
        DtypeError: `output_dtype` is below float32.
        MeshError: Ranks pass different arguments, or the mesh has only some ranks of the job.
        PlacementError: A parameter has no placement.

    Example:
        >>> import torch.distributed as dist
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights, parallelize
        >>> dist.init_process_group("fake", rank=0, world_size=4)
        >>> mesh = MoEMesh.init("cpu", dp=4, ep=2)
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> _ = parallelize(layer, mesh)
        >>> layer.router.weight_ED.to_local().shape  # a quarter of 4 x 8
        torch.Size([1, 8])
    """
    check_mesh("parallelize", mesh)
    rows = obligations(model, mesh)
    units = _units(model, blocks)
    _check_new(model, rows)
    settings = {
        **{row.name: f"{list(row.global_shape)} {row}" for row in rows},
        "replicas": replicas,
        "policy": policy,
        "reshard_after_forward": reshard_after_forward,
        "blocks": [name for name, module in model.named_modules() if module in units[:-1]],
    }
    mesh.check_ranks_agree("parallelize", settings)
    _check_outputs(policy)
    parameters = Obligations(row for row in rows if not row.is_buffer)
    stores = Stores(mesh, replicas)
    # All that can be refused comes first: a model is never left half stored.
    stored = [(row, stores[row], shard_dim(row, stores[row].shards)) for row in parameters]
    aliases = _aliases(model)
    infos: dict[object, FSDPMeshInfo] = {}
    where: dict[int, ShardPlacementResult] = {}
    for row, store, dim in stored:
        typed = _replace(model, aliases, row, store)
        where[id(typed)] = ShardPlacementResult(StoredShard(dim), _mesh_info(store, infos))
    for unit in units:
        fully_shard(
            unit,
            mesh=stores[parameters[0]].data,
            shard_placement_fn=lambda parameter: where[id(parameter)],
            mp_policy=_summing_wide(policy or MixedPrecisionPolicy(), model),
            reshard_after_forward=reshard_after_forward,
        )
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other way to leave sums alone
        _compute_plainly(unit)
    return model


def _units(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks, inner ones first, and the model."""
    asked = list(blocks)
    inside = list(model.modules())
    for block in asked:
        if not any(block is module for module in inside[1:]):
            raise ConfigError(
                explain(
                    "parallelize",
                    f"a block, {type(block).__name__}, is not part of {type(model).__name__}",
                    why="a block is a module inside the model, and is gathered on its own",
                    fixes=["blocks=model.blocks   # the list that the model itself runs"],
                )
            )
    return [module for module in reversed(inside) if any(module is b for b in [*asked, model])]


def _check_new(model: nn.Module, rows: Obligations) -> None:
    for row in rows:
        if not row.is_buffer and isinstance(model.get_parameter(row.name), DTensor):
            raise ConfigError(
                explain(
                    "parallelize",
                    f"{row.name!r} is a DTensor already",
                    why="what is stored in parts cannot be cut once more",
                    fixes=["call it once, on the model as it was built"],
                )
            )


def _check_outputs(policy: MixedPrecisionPolicy | None) -> None:
    dtype = policy and policy.output_dtype
    if dtype and torch.promote_types(dtype, torch.float32) is not dtype:
        raise DtypeError(
            explain(
                "parallelize",
                f"the policy's output_dtype is {short_dtype(dtype)}; it must be f32 or wider",
                why="FSDP rounds all that a unit returns to it, the layers' sums for losses too",
                fixes=["output_dtype=None   # and a cast in the model's own forward, where needed"],
            )
        )


def _aliases(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place of every parameter: a tied one has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return places


def _replace(
    model: nn.Module,
    aliases: dict[int, list[tuple[nn.Module, str]]],
    row: Obligation,
    store: Store,
) -> nn.Parameter:
    """The parameter as a part of a whole over the axes that FSDP does not touch."""
    old = model.get_parameter(row.name)
    new = nn.Parameter(store.typed(row, old.detach()), requires_grad=old.requires_grad)
    for module, name in aliases[id(old)]:
        module.register_parameter(name, new)
    return new


def _mesh_info(store: Store, infos: dict[object, FSDPMeshInfo]) -> FSDPMeshInfo:
    """The record that passes a mesh to FSDP, which requires one for each process group."""
    if store.data.ndim == 1:
        info = FSDPMeshInfo(store.data, shard_mesh_dim=0)
    else:
        info = HSDPMeshInfo(store.data, shard_mesh_dim=1, replicate_mesh_dim=0)
    return infos.setdefault(tuple(store.data.get_all_groups()), info)


def _summing_wide(policy: MixedPrecisionPolicy, model: nn.Module) -> MixedPrecisionPolicy:
    if policy.reduce_dtype is not None:
        return policy
    dtype = policy.param_dtype or torch.float32
    if policy.param_dtype is None:
        for parameter in model.parameters():
            dtype = torch.promote_types(dtype, parameter.dtype)
    return replace(policy, reduce_dtype=torch.promote_types(dtype, torch.float32))


def _compute_plainly(unit: FSDPModule) -> None:
    """Let the gathered parameter be the local tensor, not a DTensor over the other axes.

    FSDP cuts the local tensor of a DTensor, and wraps it up again when it is gathered. These two
    private fields are all that makes it wrap; `test_parallelize.py` sees it if that changes.
    """
    state: Any = unit._get_fsdp_state()
    for group in state._fsdp_param_groups:
        for stored in group.fsdp_params:
            stored.is_dtensor, stored._unsharded_dtensor_spec = False, None
