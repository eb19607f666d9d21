"""How a swapped model's parameters lie in checkpoints; kept on the model by `swap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor, nn

from spmd_moe.core.errors import CheckpointError, ConfigError, explain
from spmd_moe.core.mesh import MoEMesh, check_mesh
from spmd_moe.core.validate import check_instance
from spmd_moe.hf.element_map import FileTensor, Part
from spmd_moe.hf.safetensors_slices import DamagedFileError, Folder
from spmd_moe.layer.moe import MoE
from spmd_moe.train.obligations import Obligation, obligations
from spmd_moe.train.storage_mesh import local, place_in_whole, settled

_NAME = "_spmd_moe_hf_layout"  # in the model's own dict, so that copies have it too


@final
@dataclass(slots=True)
class Layout:
    """The tensors of a checkpoint as transformers writes it, and as transformers has it in memory.

    `source` is the folder that was loaded last, as the next save writes the same files.
    """

    disk: Sequence[FileTensor]
    memory: Sequence[FileTensor]
    aliases: Mapping[str, str]  # keys of tied parameters: the key that is written
    source: Folder | None = None


def layout_of(model: nn.Module) -> Layout | None:
    found = vars(model).get(_NAME)
    return found if isinstance(found, Layout) else None


def set_layout(model: nn.Module, layout: Layout) -> None:
    vars(model)[_NAME] = layout


def rows_and_parts(model: nn.Module, mesh: MoEMesh) -> dict[str, tuple[Obligation, Part]]:
    """What this rank has of each parameter and buffer that is in checkpoints."""
    found = {}
    for row in obligations(settled(model), mesh):
        if row.name.endswith(".seen_E"):
            continue  # a counter of ours
        tensor = tensor_of(model, row)
        at = place_in_whole(row.placement, mesh, tensor)
        found[row.name] = row, Part(local(tensor), row.global_shape, at)
    return found


def tensor_of(model: nn.Module, row: Obligation) -> Tensor:
    return model.get_buffer(row.name) if row.is_buffer else model.get_parameter(row.name)


def zero_buffers(router: nn.Module) -> None:
    """The selection bias and the counter of choices, as a new router has them."""
    for buffer in router.buffers():
        buffer.zero_()


def needed_layout(where: str, model: nn.Module, mesh: MoEMesh) -> Layout:
    """The layout of a model that `swap` has changed on this mesh; any other is refused."""
    check_mesh(where, mesh)
    check_instance(where, "model", model, nn.Module, "model=hf.swap(model, mesh)")
    layout = layout_of(model)
    if layout is None:
        raise ConfigError(
            explain(
                where,
                f"{type(model).__name__} was not changed by hf.swap",
                why="which part of a file a rank holds is known of a model with our layers alone",
                fixes=["hf.swap(model, mesh)   # before it, on the model of transformers"],
            )
        )
    own = next((m.mesh for m in model.modules() if isinstance(m, MoE)), mesh)
    if not own.same_layout(mesh):
        raise ConfigError(
            explain(
                where,
                f"the layers of the model are on {own}, but mesh is {mesh}",
                why="the place on the mesh says which part of a tensor a rank holds",
                fixes=["the mesh that hf.swap was given"],
            )
        )
    return layout


def agreed(where: str, path: Path, mesh: MoEMesh, run: Callable[[], int]) -> int:
    """`run()` on every rank; what goes wrong with a file on any rank is raised on all of them."""
    wrong, result = "", 0
    try:
        result = run()
    except OSError as error:
        wrong = str(error.strerror or error)
    except DamagedFileError as error:
        wrong = " ".join(map(str, error.args))
    mesh.check_ranks_agree(where, {"files": wrong or "read and written"})
    if wrong:
        raise CheckpointError(
            explain(
                where,
                f"{path.name!r}: {wrong}",
                why="a checkpoint is read and written whole",
                fixes=["another folder, or room on this one"],
            )
        )
    return result
