"""What this rank has of each tensor of a training run, as parts of wholes that no layout changes.

    whole  [8, 64, 64]      this rank  [2, 32, 64]  at  (4, 32, 0)

A part says where it lies by numbers alone, so a checkpoint knows nothing of meshes. What is a sum
over ranks (P) is stored as the sum, and given to one rank when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from spmd_moe.core.errors import CheckpointError, describe, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import P, R
from spmd_moe.core.redistribute import redistribute
from spmd_moe.train.checkpoint.optimizer_json import (
    ByName,
    check_settings,
    give_settings,
    plain,
    saved_by_name,
    unknown_state,
)
from spmd_moe.train.checkpoint.strict_json import Json
from spmd_moe.train.obligations import Obligation, obligations
from spmd_moe.train.storage_mesh import local, place_in_whole, settled


@final
@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of this rank, and where it lies in the whole."""

    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def chunks(self) -> list[ChunkStorageMetadata]:
        """One, or none where a rank has no part of a small tensor."""
        if self.tensor.numel() == 0:
            return []
        return [ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """What torch.distributed.checkpoint asks of a tensor that is not torch's own."""
        properties = TensorProperties.create_from_tensor(self.tensor)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(self.shape)),
            )
            for chunk in self.chunks()
        ]


Parts: TypeAlias = dict[str, Part]
OPTIMIZER = "optimizer:"  # how the names of its tensors begin


def whole(tensor: Tensor) -> Part:
    """A tensor that is the same on all ranks."""
    return Part(tensor, tuple(tensor.shape), (0,) * tensor.ndim)


# --- the model ----------------------------------------------------------------------------------


def model_parts(
    model: nn.Module, mesh: MoEMesh, sums: Mapping[str, Tensor], prefix: str = ""
) -> Parts:
    """Every parameter and buffer; `sums` has the values that are stored for buffers that are P."""
    parts: Parts = {}
    for row in obligations(settled(model), mesh):
        if row.name in sums:
            parts[prefix + row.name] = whole(sums[row.name])
        else:
            tensor = _of_row(model, row)
            parts[prefix + row.name] = Part(
                local(tensor), row.global_shape, place_in_whole(row.placement, mesh, tensor)
            )
    return parts


@torch.no_grad()
def sums_taken(model: nn.Module, mesh: MoEMesh) -> dict[str, Tensor]:
    """The buffers that are P somewhere, summed."""
    sums = {}
    for row, buffer in _partial(model, mesh):
        total = buffer.detach()
        for k in row.placement:
            if k.kind is P:
                total = redistribute(total, mesh[k.role], src=P, dst=R)
        sums[row.name] = total.clone()  # waited for
    return sums


def sums_awaited(model: nn.Module, mesh: MoEMesh) -> dict[str, Tensor]:
    """Room for the sums that are loaded."""
    return {row.name: torch.empty_like(buffer) for row, buffer in _partial(model, mesh)}


@torch.no_grad()
def give_sums(model: nn.Module, mesh: MoEMesh, sums: Mapping[str, Tensor]) -> None:
    """Each sum to the first rank of its axes; the others have nothing to add to it."""
    for row, buffer in _partial(model, mesh):
        first = all(mesh[k.role].rank == 0 for k in row.placement if k.kind is P)
        buffer.copy_(sums[row.name]) if first else buffer.zero_()


def _partial(model: nn.Module, mesh: MoEMesh) -> Iterable[tuple[Obligation, Tensor]]:
    for row in obligations(model, mesh):
        if any(k.kind is P for k in row.placement):
            yield row, _of_row(model, row)


def _of_row(model: nn.Module, row: Obligation) -> Tensor:
    return model.get_buffer(row.name) if row.is_buffer else model.get_parameter(row.name)


# --- the optimizer ------------------------------------------------------------------------------


def optimizer_parts(
    model: nn.Module, mesh: MoEMesh, optimizer: torch.optim.Optimizer, prefix: str = ""
) -> tuple[Parts, Json]:
    """The tensors of an optimizer's state, and the rest of it."""
    parts: Parts = {}
    groups = []
    for group, rows in _groups(model, mesh, optimizer):
        state: dict[str, dict[str, Json]] = {}
        for row, parameter in rows:
            name = prefix + row.name
            state[name] = kept = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    kept[key] = {"value": plain(value, row.name, key)}
                elif value.shape == parameter.shape:
                    kept[key] = {"like_parameter": True, "dtype": _dtype_name(value)}
                    place = place_in_whole(row.placement, mesh, parameter)
                    parts[_name(name, key)] = Part(local(value), row.global_shape, place)
                elif value.ndim == 0:
                    kept[key] = {"like_parameter": False, "dtype": _dtype_name(value)}
                    parts[_name(name, key)] = whole(local(value))
                else:
                    raise unknown_state(f"{describe(value)} of {row.name!r} {key!r}")
        settings = {k: plain(v, "a group", k) for k, v in group.items() if k != "params"}
        groups.append({"settings": settings, "state": state})
    return parts, groups


def awaited_state(
    model: nn.Module, mesh: MoEMesh, optimizer: torch.optim.Optimizer, saved: Json, prefix: str = ""
) -> tuple[Parts, dict[nn.Parameter, dict[str, Any]], list[Json]]:
    """Room for the state that is loaded; it becomes the optimizer's own when all is there."""
    parts: Parts = {}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    settings = []
    by_name = saved_by_name(saved)
    for group, rows in _groups(model, mesh, optimizer):
        names = [prefix + row.name for row, _ in rows]
        kept_settings = _settings_of(names, by_name)
        check_settings(kept_settings, group, optimizer.defaults)
        # Those of the checkpoint become the optimizer's, so its step counts where they say.
        on_device = bool(kept_settings.get("fused") or kept_settings.get("capturable"))
        for name, (row, parameter) in zip(names, rows, strict=True):
            states[parameter] = state = {}
            for key, kept in by_name[name][1].items():
                if "value" in kept:
                    state[key] = kept["value"]
                    continue
                dtype = getattr(torch, kept["dtype"])
                if kept["like_parameter"]:
                    state[key] = torch.empty_like(parameter.detach(), dtype=dtype)
                    place = place_in_whole(row.placement, mesh, parameter)
                    parts[_name(name, key)] = Part(local(state[key]), row.global_shape, place)
                else:
                    device = parameter.device if on_device else torch.device("cpu")
                    state[key] = torch.empty((), dtype=dtype, device=device)
                    parts[_name(name, key)] = whole(state[key])
        settings.append(kept_settings)
    return parts, states, settings


def _settings_of(names: list[str], by_name: ByName) -> dict[str, Json]:
    """Those of a group with these parameters; an optimizer's groups need not be those saved."""
    known = [by_name[name][0] for name in names if name in by_name]
    if len(known) < len(names) or any(settings != known[0] for settings in known):
        what = "lacks some of" if len(known) < len(names) else "has several settings for"
        raise CheckpointError(
            explain(
                "load_checkpoint",
                f"the checkpoint {what} the parameters of an optimizer group: "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
                why="learning rates and moments are stored by name, and one group has one setting",
                fixes=[
                    "the optimizer with the groups that were saved",
                    "optimizer=None   # weights only",
                ],
            )
        )
    return known[0] if known else {}


def give_state(
    optimizer: torch.optim.Optimizer,
    states: Mapping[nn.Parameter, dict[str, Any]],
    settings: Iterable[Json],
) -> None:
    optimizer.state.clear()
    optimizer.state.update({parameter: state for parameter, state in states.items() if state})
    for group, saved in zip(optimizer.param_groups, settings, strict=True):
        give_settings(group, saved)


def _groups(
    model: nn.Module, mesh: MoEMesh, optimizer: torch.optim.Optimizer
) -> list[tuple[dict[str, Any], list[tuple[Obligation, nn.Parameter]]]]:
    """The optimizer's groups, with the row of each parameter."""
    rows = [row for row in obligations(settled(model), mesh) if not row.is_buffer]
    known = {id(model.get_parameter(row.name)): row for row in rows}
    for group in optimizer.param_groups:
        if any(id(parameter) not in known for parameter in group["params"]):
            raise CheckpointError(
                explain(
                    "save_checkpoint",
                    "the optimizer has a parameter that is not the model's",
                    why="its state is stored under the names of the model",
                    fixes=["make the optimizer after parallelize, which replaces parameters"],
                )
            )
    return [
        (group, [(known[id(parameter)], parameter) for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


def _name(parameter: str, key: str) -> str:
    return f"{OPTIMIZER}{parameter}:{key}"


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
