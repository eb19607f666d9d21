"""spmd_moe: a Mixture-of-Experts layer in which every tensor's placement is part of its type.

Folders, in the order in which they may import each other:

    core/        the vocabulary and the moves: placements, the mesh, collectives, redistribute
    layer/       the layer, in the order of the data: router, dispatch, experts, combine, losses
    train/       whole models: obligations, FSDP2, gradients, initial values, checkpoints
    signatures/  one walk over annotated functions, for the sanitizer and the traced check
    sanitize/    checks inside a running job
    check/       checks in one process: plan, traced, values; the command line
    static/      checks by mypy; needs no torch
    tooling/     programs that write data files of the package
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# numpy is optional. Without it, torch's first import would otherwise warn before anything else.
warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)

if TYPE_CHECKING:
    from spmd_moe.core.collectives import declare_sum as declare_sum
    from spmd_moe.core.collectives import exchange as exchange
    from spmd_moe.core.declare_placements import declare_placements as declare_placements
    from spmd_moe.core.errors import CheckpointError as CheckpointError
    from spmd_moe.core.errors import ConfigError as ConfigError
    from spmd_moe.core.errors import DtypeError as DtypeError
    from spmd_moe.core.errors import GradientError as GradientError
    from spmd_moe.core.errors import MeshError as MeshError
    from spmd_moe.core.errors import PlacementError as PlacementError
    from spmd_moe.core.errors import RoutingError as RoutingError
    from spmd_moe.core.errors import SanitizerError as SanitizerError
    from spmd_moe.core.errors import ShapeError as ShapeError
    from spmd_moe.core.errors import SpmdMoeError as SpmdMoeError
    from spmd_moe.core.mesh import Axis as Axis
    from spmd_moe.core.mesh import MoEMesh as MoEMesh
    from spmd_moe.core.placement import CP as CP
    from spmd_moe.core.placement import DP as DP
    from spmd_moe.core.placement import EDP as EDP
    from spmd_moe.core.placement import EP as EP
    from spmd_moe.core.placement import ETP as ETP
    from spmd_moe.core.placement import TP as TP
    from spmd_moe.core.placement import I as I
    from spmd_moe.core.placement import Kind as Kind
    from spmd_moe.core.placement import P as P
    from spmd_moe.core.placement import Placed as Placed
    from spmd_moe.core.placement import Placement as Placement
    from spmd_moe.core.placement import R as R
    from spmd_moe.core.placement import Role as Role
    from spmd_moe.core.placement import S as S
    from spmd_moe.core.placement import V as V
    from spmd_moe.core.redistribute import redistribute as redistribute
    from spmd_moe.core.shard_shape import ShardShape as ShardShape
    from spmd_moe.layer.activations import CLAMPED_SWIGLU as CLAMPED_SWIGLU
    from spmd_moe.layer.activations import GELU as GELU
    from spmd_moe.layer.activations import SQUARED_RELU as SQUARED_RELU
    from spmd_moe.layer.activations import SWIGLU as SWIGLU
    from spmd_moe.layer.activations import Activation as Activation
    from spmd_moe.layer.activations import clamped_swiglu as clamped_swiglu
    from spmd_moe.layer.balance_losses import LossTerms as LossTerms
    from spmd_moe.layer.balance_losses import Totals as Totals
    from spmd_moe.layer.balance_losses import balance_loss as balance_loss
    from spmd_moe.layer.balance_losses import merge_microbatches as merge_microbatches
    from spmd_moe.layer.balance_losses import reduce_loss_terms as reduce_loss_terms
    from spmd_moe.layer.balance_losses import z_loss as z_loss
    from spmd_moe.layer.dispatch import AllGather as AllGather
    from spmd_moe.layer.dispatch import AllToAll as AllToAll
    from spmd_moe.layer.dispatch import DedupAllToAll as DedupAllToAll
    from spmd_moe.layer.dispatch import Dispatcher as Dispatcher
    from spmd_moe.layer.dispatch import FixedCapacity as FixedCapacity
    from spmd_moe.layer.dispatch import Local as Local
    from spmd_moe.layer.expert_load import expert_load as expert_load
    from spmd_moe.layer.grouped_matmul import GroupedMatmul as GroupedMatmul
    from spmd_moe.layer.grouped_matmul import LoopedMatmul as LoopedMatmul
    from spmd_moe.layer.grouped_matmul import Masked as Masked
    from spmd_moe.layer.grouped_matmul import TorchGroupedMM as TorchGroupedMM
    from spmd_moe.layer.moe import MoE as MoE
    from spmd_moe.layer.moe_config import ExpertRecompute as ExpertRecompute
    from spmd_moe.layer.moe_config import MoEConfig as MoEConfig
    from spmd_moe.layer.moe_config import ScoreApplication as ScoreApplication
    from spmd_moe.layer.moe_config import SharedConfig as SharedConfig
    from spmd_moe.layer.moe_output import MoEOutput as MoEOutput
    from spmd_moe.layer.router import Routing as Routing
    from spmd_moe.layer.router_config import RouterConfig as RouterConfig
    from spmd_moe.layer.selection_bias import update_selection_bias as update_selection_bias
    from spmd_moe.sanitize.watch_job import sanitize as sanitize
    from spmd_moe.train.checkpoint.save_load import latest_checkpoint as latest_checkpoint
    from spmd_moe.train.checkpoint.save_load import load_checkpoint as load_checkpoint
    from spmd_moe.train.checkpoint.save_load import save_checkpoint as save_checkpoint
    from spmd_moe.train.gradients import clip_grad_norm_ as clip_grad_norm_
    from spmd_moe.train.gradients import reduce_gradients as reduce_gradients
    from spmd_moe.train.hang_watch import watch_hangs as watch_hangs
    from spmd_moe.train.init_weights import init_weights as init_weights
    from spmd_moe.train.obligations import obligations as obligations
    from spmd_moe.train.parallelize import parallelize as parallelize
    from spmd_moe.train.recompute import recompute as recompute
else:
    # Each name is imported from its module on first use, so a tool that needs one module does not
    # import torch for all. Hidden from mypy, which would accept every typo as a name.
    import sys
    from types import ModuleType

    _MODULES = {
        "core.collectives": "declare_sum exchange",
        "core.declare_placements": "declare_placements",
        "core.errors": "CheckpointError ConfigError DtypeError GradientError MeshError "
        "PlacementError RoutingError SanitizerError ShapeError SpmdMoeError",
        "core.mesh": "Axis MoEMesh",
        "core.placement": "CP DP EDP EP ETP I Kind P Placed Placement R Role S TP V",
        "core.redistribute": "redistribute",
        "core.shard_shape": "ShardShape",
        "layer.activations": "CLAMPED_SWIGLU GELU SQUARED_RELU SWIGLU Activation clamped_swiglu",
        "layer.balance_losses": "LossTerms Totals balance_loss merge_microbatches "
        "reduce_loss_terms z_loss",
        "layer.dispatch": "AllGather AllToAll DedupAllToAll Dispatcher FixedCapacity Local",
        "layer.expert_load": "expert_load",
        "layer.grouped_matmul": "GroupedMatmul LoopedMatmul Masked TorchGroupedMM",
        "layer.moe": "MoE",
        "layer.moe_config": "ExpertRecompute MoEConfig ScoreApplication SharedConfig",
        "layer.moe_output": "MoEOutput",
        "layer.router": "Routing",
        "layer.router_config": "RouterConfig",
        "layer.selection_bias": "update_selection_bias",
        "sanitize.watch_job": "sanitize",
        "train.checkpoint.save_load": "latest_checkpoint load_checkpoint save_checkpoint",
        "train.gradients": "clip_grad_norm_ reduce_gradients",
        "train.hang_watch": "watch_hangs",
        "train.init_weights": "init_weights",
        "train.obligations": "obligations",
        "train.parallelize": "parallelize",
        "train.recompute": "recompute",
    }
    _HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
    __all__ = sorted(_HOME)

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'spmd_moe' has no attribute {name!r}")
        return getattr(import_module(f"spmd_moe.{_HOME[name]}"), name)

    def __dir__():
        return sorted({*globals(), *__all__})

    class _Package(ModuleType):
        """`spmd_moe.sanitize` is the function, also after the folder of that name is imported."""

        def __setattr__(self, name, value):
            if not (isinstance(value, ModuleType) and name in _HOME):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package
