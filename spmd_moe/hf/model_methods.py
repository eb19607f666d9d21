"""Methods of a swapped model: `save_pretrained` with transformers' names, and `forward`."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from torch import nn

from spmd_moe.core.errors import CheckpointError, ConfigError, explain
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DENSE
from spmd_moe.hf.checkpoint_layout import layout_of
from spmd_moe.hf.pooled_loss import MESH, with_pooled_loss
from spmd_moe.hf.write_checkpoint import save
from spmd_moe.layer.moe import MoE


def override_methods(model: nn.Module, mesh: MoEMesh) -> None:
    """Give the model, and the models in it, classes of the same names with our methods."""
    for module in model.modules():
        kind = type(module)
        inside = any(isinstance(child, MoE) for child in module.modules())
        if inside and hasattr(kind, "save_pretrained"):
            vars(module)[MESH] = mesh
            own = {
                "save_pretrained": _save_pretrained,
                "resize_token_embeddings": _resize_token_embeddings,
                "forward": with_pooled_loss(kind.forward),
                "__module__": kind.__module__,
            }
            module.__class__ = type(kind.__name__, (kind,), own)


def _resize_token_embeddings(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    """Refused: rows that are drawn on each rank differ, and the new tensor has no placement."""
    raise ConfigError(
        explain(
            "resize_token_embeddings",
            f"{type(self).__name__} has layers of spmd_moe",
            why="each rank would draw rows of its own for a tensor that is replicated",
            fixes=["model.resize_token_embeddings(...)   # before hf.swap, with one seed"],
        )
    )


def _save_pretrained(
    self: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    **other: Any,
) -> None:
    """Write the checkpoint, where one process has all of the model."""
    mesh = vars(self).get(MESH)
    given = [name for name, value in other.items() if value]
    whole = layout_of(self) is not None and not given
    if whole and isinstance(mesh, MoEMesh) and all(mesh[role].size == 1 for role in DENSE):
        save(self, save_directory, mesh)
        return
    raise CheckpointError(
        explain(
            "save_pretrained",
            f"{type(self).__name__} has layers of spmd_moe"
            + (f", and {given[0]} is given" if given else ""),
            why="every rank writes its own part of them, so it has to be called on all",
            fixes=["spmd_moe.hf.save(model, folder, mesh)   # on every rank, of the whole model"],
        )
    )
