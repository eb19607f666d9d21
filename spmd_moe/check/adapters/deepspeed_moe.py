"""DeepSpeed's two MoE layers with expert parallelism, unmodified.

    deepspeed:moe
    deepspeed:autoep

Of `moe`, experts are sharded over all ranks, and no tokens are dropped. The tokens of a rank of tp
are those of the other ranks of tp, as where the rest of a model is tensor-parallel.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from spmd_moe.check.adapters.deepspeed_autoep import (
    DIM,
    DISPATCH,
    EXPERTS,
    HIDDEN,
    LAYER,
    autoep_target,
)
from spmd_moe.check.adapters.import_framework import empty_modules, framework, member
from spmd_moe.check.target import Case, cannot

# Imported by deepspeed, and not used by its MoE layer.
OPTIONAL = frozenset({"hjson", "msgpack", "ninja", "cpuinfo", "einops", "tqdm"})


def deepspeed_target(name: str, plan: str | None, path: str | None) -> Callable[..., Case]:
    """A target of one of the layers, with experts over all ranks."""
    if name not in ("moe", "autoep") or plan not in (None, "ep"):
        have = "there are deepspeed:moe and deepspeed:autoep; the plan is ep"
        raise cannot("TARGET", f"there is no deepspeed:{name} --plan {plan or 'ep'}", have)
    with empty_modules(OPTIONAL) as missing:
        package: Any = framework("deepspeed", path)
        layer = member("deepspeed.moe.layer", "MoE")
        sharded: Any = member("deepspeed.moe.sharded_moe")
        groups = member("deepspeed.utils.groups")
        automatic = autoep_target() if name == "autoep" else None
    units = _Units()

    def target(mesh: DeviceMesh, *, batch: int = 4, top_k: int = 2) -> Case:
        world, rank = mesh.size(), dist.get_rank()
        if EXPERTS % world:
            raise ValueError(f"{EXPERTS} experts do not divide over {world} ranks")
        units.tp = mesh["tp"]
        moe = layer(
            DIM,
            _Expert(),
            num_experts=EXPERTS,
            ep_size=world,
            k=top_k,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter.normal_(std=0.3)
        moe.deepspeed_moe._set_ep_group(dist.group.WORLD if world > 1 else None)

        def call(hidden_states: torch.Tensor) -> object:
            return moe(hidden_states)[0]

        def names(name: str) -> str:
            first = rank * EXPERTS // world
            return re.sub(
                r"(?<=deepspeed_experts\.)\d+", lambda found: str(int(found[0]) + first), name
            )

        x = torch.randn(batch, 8, DIM)
        return Case(moe, (x,), ("dp 0",), call=call, trainer="sum dp", names=names)

    if automatic is not None:
        target = automatic
    target.__qualname__ = f"deepspeed:{name}"
    vars(target).update(axes=("dp", "tp"), stand_ins=("float64", "grouped_mm"))
    patches = [(sharded, "dist", dist), (package, "comm", _Comm()), (groups, "mpu", units)]
    if hasattr(sharded, "pg_utils"):
        patches.append((sharded.pg_utils, "dist", dist))
    if automatic is not None:
        patches += [(member(part), "dist", dist) for part in (LAYER, DISPATCH)]
    vars(target)["patches"] = patches
    notes = [
        "deepspeed.comm is torch.distributed; its all_gather_into_tensor takes the input flat",
        "deepspeed's groups.mpu is the axis tp of the mesh",
    ]
    if missing:
        notes.append(f"empty in place of missing: {', '.join(sorted(missing))}")
    vars(target)["notes"] = tuple(notes)
    return target


@final
class _Comm:
    """torch.distributed in place of deepspeed.comm, which is set up for a whole process."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather_into_tensor(
        self, out: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup
    ) -> None:
        """As on GPUs: gloo refuses a flat output of an input that is not flat."""
        dist.all_gather_into_tensor(out, x.reshape(-1), group=group)


@final
class _Units(threading.local):
    """The interface of Megatron's `mpu` that DeepSpeed reads: the tensor-parallel ranks."""

    tp: DeviceMesh

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tp.get_local_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tp.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp.get_group()


@final
class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(x)))
        return out
