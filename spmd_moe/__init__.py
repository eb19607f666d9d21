"""spmd_moe: a Mixture-of-Experts layer in which every tensor's placement is part of its type."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spmd_moe.activation import CLAMPED_SWIGLU as CLAMPED_SWIGLU
    from spmd_moe.activation import GELU as GELU
    from spmd_moe.activation import SQUARED_RELU as SQUARED_RELU
    from spmd_moe.activation import SWIGLU as SWIGLU
    from spmd_moe.activation import Activation as Activation
    from spmd_moe.activation import clamped_swiglu as clamped_swiglu
    from spmd_moe.checkpoint import latest_checkpoint as latest_checkpoint
    from spmd_moe.checkpoint import load_checkpoint as load_checkpoint
    from spmd_moe.checkpoint import save_checkpoint as save_checkpoint
    from spmd_moe.collectives import Dtype as Dtype
    from spmd_moe.collectives import declare_sum as declare_sum
    from spmd_moe.collectives import exchange as exchange
    from spmd_moe.declare import declare as declare
    from spmd_moe.dispatch import AllGather as AllGather
    from spmd_moe.dispatch import AllToAll as AllToAll
    from spmd_moe.dispatch import Arrived as Arrived
    from spmd_moe.dispatch import Dispatcher as Dispatcher
    from spmd_moe.dispatch import FixedCapacity as FixedCapacity
    from spmd_moe.dispatch import Local as Local
    from spmd_moe.errors import CheckpointError as CheckpointError
    from spmd_moe.errors import ConfigError as ConfigError
    from spmd_moe.errors import DtypeError as DtypeError
    from spmd_moe.errors import GradientError as GradientError
    from spmd_moe.errors import MeshError as MeshError
    from spmd_moe.errors import PlacementError as PlacementError
    from spmd_moe.errors import RoutingError as RoutingError
    from spmd_moe.errors import SanitizerError as SanitizerError
    from spmd_moe.errors import ShapeError as ShapeError
    from spmd_moe.errors import SpmdMoeError as SpmdMoeError
    from spmd_moe.experts import Experts as Experts
    from spmd_moe.experts import Keep as Keep
    from spmd_moe.experts import Weigh as Weigh
    from spmd_moe.fault import check_marks as check_marks
    from spmd_moe.grouped import GroupedMatmul as GroupedMatmul
    from spmd_moe.grouped import Masked as Masked
    from spmd_moe.grouped import Matmul as Matmul
    from spmd_moe.grouped import PerExpert as PerExpert
    from spmd_moe.grouped import TorchGroupedMM as TorchGroupedMM
    from spmd_moe.init import init_weights as init_weights
    from spmd_moe.load import Load as Load
    from spmd_moe.load import expert_load as expert_load
    from spmd_moe.losses import BatchTotals as BatchTotals
    from spmd_moe.losses import GroupSums as GroupSums
    from spmd_moe.losses import GroupTotals as GroupTotals
    from spmd_moe.losses import LossTerms as LossTerms
    from spmd_moe.losses import Sums as Sums
    from spmd_moe.losses import Totals as Totals
    from spmd_moe.losses import as_one_batch as as_one_batch
    from spmd_moe.losses import balance_loss as balance_loss
    from spmd_moe.losses import totals as totals
    from spmd_moe.losses import update_selection_bias as update_selection_bias
    from spmd_moe.losses import z_loss as z_loss
    from spmd_moe.mesh import Axis as Axis
    from spmd_moe.mesh import MoEMesh as MoEMesh
    from spmd_moe.moe import MoE as MoE
    from spmd_moe.moe import MoEConfig as MoEConfig
    from spmd_moe.moe import MoEOutput as MoEOutput
    from spmd_moe.moe import SharedConfig as SharedConfig
    from spmd_moe.obligations import Obligation as Obligation
    from spmd_moe.obligations import Obligations as Obligations
    from spmd_moe.obligations import obligations as obligations
    from spmd_moe.optim import clip_grad_norm_ as clip_grad_norm_
    from spmd_moe.optim import reduce_gradients as reduce_gradients
    from spmd_moe.parallelize import parallelize as parallelize
    from spmd_moe.permute import Gather as Gather
    from spmd_moe.permute import Slots as Slots
    from spmd_moe.permute import spread as spread
    from spmd_moe.permute import take_scores as take_scores
    from spmd_moe.placement import CP as CP
    from spmd_moe.placement import DP as DP
    from spmd_moe.placement import EDP as EDP
    from spmd_moe.placement import EP as EP
    from spmd_moe.placement import ETP as ETP
    from spmd_moe.placement import TP as TP
    from spmd_moe.placement import ExpertHiddenBias as ExpertHiddenBias
    from spmd_moe.placement import ExpertInWeight as ExpertInWeight
    from spmd_moe.placement import ExpertOutBias as ExpertOutBias
    from spmd_moe.placement import ExpertOutWeight as ExpertOutWeight
    from spmd_moe.placement import GatheredRows as GatheredRows
    from spmd_moe.placement import I as I
    from spmd_moe.placement import Kind as Kind
    from spmd_moe.placement import P as P
    from spmd_moe.placement import Placed as Placed
    from spmd_moe.placement import Placement as Placement
    from spmd_moe.placement import R as R
    from spmd_moe.placement import Role as Role
    from spmd_moe.placement import RoleKind as RoleKind
    from spmd_moe.placement import RouterWeight as RouterWeight
    from spmd_moe.placement import RowSums as RowSums
    from spmd_moe.placement import S as S
    from spmd_moe.placement import Tokens as Tokens
    from spmd_moe.placement import TokenSums as TokenSums
    from spmd_moe.placement import V as V
    from spmd_moe.placement import Whole as Whole
    from spmd_moe.placement import placement_of as placement_of
    from spmd_moe.placement import placements_of as placements_of
    from spmd_moe.recompute import recompute as recompute
    from spmd_moe.redistribute import Shape as Shape
    from spmd_moe.redistribute import redistribute as redistribute
    from spmd_moe.router import Router as Router
    from spmd_moe.router import RouterConfig as RouterConfig
    from spmd_moe.router import Routing as Routing
    from spmd_moe.router import ScoreName as ScoreName
    from spmd_moe.sanitize import Sanitizer as Sanitizer
    from spmd_moe.sanitize import sanitize as sanitize
    from spmd_moe.shard import ShardShape as ShardShape
else:
    # Each name is loaded from its file when it is first asked for, so that a tool which needs one
    # file does not import torch for all. Hidden from mypy, to which every typo would be a name.
    import sys
    from types import ModuleType

    _FILES = {
        "activation": "CLAMPED_SWIGLU GELU SQUARED_RELU SWIGLU Activation clamped_swiglu",
        "checkpoint": "latest_checkpoint load_checkpoint save_checkpoint",
        "declare": "declare",
        "collectives": "Dtype declare_sum exchange",
        "dispatch": "AllGather AllToAll Arrived Dispatcher FixedCapacity Local",
        "errors": "CheckpointError ConfigError DtypeError GradientError MeshError "
        "PlacementError RoutingError SanitizerError ShapeError SpmdMoeError",
        "experts": "Experts Keep Weigh",
        "fault": "check_marks",
        "grouped": "GroupedMatmul Masked Matmul PerExpert TorchGroupedMM",
        "init": "init_weights",
        "load": "Load expert_load",
        "losses": "BatchTotals GroupSums GroupTotals LossTerms Sums Totals as_one_batch "
        "balance_loss totals update_selection_bias z_loss",
        "mesh": "Axis MoEMesh",
        "moe": "MoE MoEConfig MoEOutput SharedConfig",
        "obligations": "Obligation Obligations obligations",
        "optim": "clip_grad_norm_ reduce_gradients",
        "permute": "Gather Slots spread take_scores",
        "placement": "CP DP EDP EP ETP ExpertHiddenBias ExpertInWeight ExpertOutBias "
        "ExpertOutWeight GatheredRows I Kind P Placed Placement R Role RoleKind "
        "RouterWeight RowSums S TP TokenSums Tokens V Whole placement_of "
        "placements_of",
        "redistribute": "Shape redistribute",
        "router": "Router RouterConfig Routing ScoreName",
        "parallelize": "parallelize",
        "sanitize": "Sanitizer sanitize",
        "recompute": "recompute",
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
