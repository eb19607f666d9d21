"""spmd_moe: a Mixture-of-Experts layer in which every tensor's placement is part of its type."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spmd_moe.errors import DtypeError as DtypeError
    from spmd_moe.errors import MeshError as MeshError
    from spmd_moe.errors import PlacementError as PlacementError
    from spmd_moe.errors import ShapeError as ShapeError
    from spmd_moe.errors import SpmdMoeError as SpmdMoeError
    from spmd_moe.mesh import Axis as Axis
    from spmd_moe.mesh import MoEMesh as MoEMesh
    from spmd_moe.placement import CP as CP
    from spmd_moe.placement import DP as DP
    from spmd_moe.placement import EDP as EDP
    from spmd_moe.placement import EP as EP
    from spmd_moe.placement import ETP as ETP
    from spmd_moe.placement import TP as TP
    from spmd_moe.placement import I as I
    from spmd_moe.placement import P as P
    from spmd_moe.placement import Placed as Placed
    from spmd_moe.placement import Placement as Placement
    from spmd_moe.placement import R as R
    from spmd_moe.placement import Role as Role
    from spmd_moe.placement import S as S
    from spmd_moe.placement import V as V
    from spmd_moe.placement import placement_of as placement_of
    from spmd_moe.placement import placements_of as placements_of
    from spmd_moe.redistribute import redistribute as redistribute
    from spmd_moe.shard import ShardShape as ShardShape
else:
    # Each name is loaded from its file when it is first asked for, so that a tool which needs one
    # file does not import torch for all. Hidden from mypy, to which every typo would be a name.
    import sys
    from types import ModuleType

    _FILES = {
        "errors": "DtypeError MeshError PlacementError ShapeError SpmdMoeError",
        "mesh": "Axis MoEMesh",
        "placement": "DP CP TP EDP EP ETP R I V P S Placed Placement Role "
        "placement_of placements_of",
        "redistribute": "redistribute",
        "shard": "ShardShape",
    }
    _HOME = {name: file for file, names in _FILES.items() for name in names.split()}
    __all__ = sorted(_HOME)

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'spmd_moe' has no attribute {name!r}")
        return getattr(import_module(f"spmd_moe.{_HOME[name]}"), name)

    class _Package(ModuleType):
        """`spmd_moe.redistribute` is the function, also after its file of that name is loaded."""

        def __setattr__(self, name, value):
            if not (isinstance(value, ModuleType) and name in _HOME):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package
