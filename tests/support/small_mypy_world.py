"""A world small enough for a checker to read in a moment: as much of torch as a few lines need.

Names stand in the modules where the real ones do, by which the plugin knows them. `placement.py` is
the real one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """[mypy]
{plugin}
strict = True
implicit_reexport = True
warn_unreachable = True
mypy_path = {world}
[spmd_moe]
strict = c, e
"""
REAL = ("core/placement.py", "core/errors.py")

FILES = {
    "torch/__init__.pyi": """
from torch import distributed as distributed, nn as nn
from torch._C._VariableFunctions import cat as cat
from torch._tensor import Tensor as Tensor
""",
    "torch/_C/__init__.pyi": """
from typing import Self
class TensorBase:
    shape: tuple[int, ...]
    dtype: object
    @property
    def T(self) -> Self: ...
    def __add__(self, other: object) -> Self: ...
    def __mul__(self, other: object) -> Self: ...
    def exp(self) -> Self: ...
    def sum(self, dim: int) -> Self: ...
""",
    "torch/_C/_VariableFunctions.pyi": """
from torch._tensor import Tensor
def cat(tensors: list[Tensor], dim: int = 0) -> Tensor: ...
""",
    "torch/_tensor.pyi": """
from torch._C import TensorBase
class Tensor(TensorBase): ...
""",
    "torch/nn/__init__.pyi": "from torch.nn.modules.module import Module as Module\n",
    "torch/nn/modules/__init__.pyi": "",
    "torch/nn/modules/module.pyi": """
from typing import Any
class Module:
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
""",
    "torch/distributed/__init__.pyi": """
from torch._tensor import Tensor
def all_reduce(tensor: Tensor) -> None: ...
""",
    "spmd_types/__init__.pyi": """
from spmd_types.types import I as I, P as P, R as R, V as V, Shard as Shard
from spmd_types.types import PerMeshAxisLocalSpmdType as PerMeshAxisLocalSpmdType
class SpmdTypeError(Exception): ...
""",
    "spmd_types/types.pyi": """
class PerMeshAxisLocalSpmdType: ...
class Shard:
    dim: int
    def __init__(self, dim: int) -> None: ...
R: PerMeshAxisLocalSpmdType
I: PerMeshAxisLocalSpmdType
V: PerMeshAxisLocalSpmdType
P: PerMeshAxisLocalSpmdType
""",
    "spmd_moe/__init__.pyi": """
from spmd_moe.core.mesh import MoEMesh as MoEMesh
from spmd_moe.core.placement import DP as DP, EP as EP, TP as TP, Placed as Placed, Role as Role
from spmd_moe.core.placement import I as I, P as P, R as R, S as S, V as V
from spmd_moe.core.redistribute import redistribute as redistribute
""",
    "spmd_moe/core/__init__.pyi": "",
    "spmd_moe/core/mesh.pyi": """
from spmd_moe.core.placement import Role
class Axis:
    rank: int
class MoEMesh:
    def __getitem__(self, role: Role) -> Axis: ...
""",
    "spmd_moe/core/redistribute.pyi": """
from spmd_moe.core.mesh import Axis
from torch import Tensor
def redistribute(x: Tensor, axis: Axis, *, src: object, dst: object) -> Tensor: ...
""",
}


def build(folder: Path, *, plugin: bool = True) -> Path:
    """Write the world, and settings of mypy's for it; `c` and `e` are strict modules."""
    world = folder / "world"
    for name, text in FILES.items():
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_text(text)
    for name in REAL:
        shutil.copy(ROOT / "spmd_moe" / name, world / "spmd_moe" / name)
    settings = folder / "mypy.ini"
    line = "plugins = spmd_moe.mypy_plugin" if plugin else ""
    settings.write_text(SETTINGS.format(world=world, plugin=line))
    return settings
