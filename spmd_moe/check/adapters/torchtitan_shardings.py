"""torchtitan's MoE layer of 0.3.x under its own sharding configuration, unmodified."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from spmd_types import S
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from spmd_moe.check.adapters.import_framework import member
from spmd_moe.check.target import Case

DIM, HIDDEN, EXPERTS = 16, 24, 8
# The dims that torchtitan shards over tp where experts are not sharded over ranks.
SHARDED = {"w1_EFD": 1, "w2_EDF": 2, "w3_EFD": 1}
_EXPERTS = "routed_experts.inner_experts"
_init = partial(nn.init.normal_, std=0.3)


def typed_target(plan: str) -> Callable[..., Case]:
    """A target of the layer, with experts over all ranks or their hidden dims over tp."""
    common, distributed = "torchtitan.models.common", "torchtitan.distributed"
    configs: Any = member(f"{common}.config_utils")
    dense = member(f"{common}.feed_forward", "FeedForward")
    linear = member(f"{common}.linear", "Linear")
    shard = member(f"{common}.moe_sharding", "set_moe_sharding_config")
    dims: Any = member(f"{distributed}.parallel_dims")
    utils: Any = member(f"{distributed}.utils")
    typed: Any = member(f"{distributed}.spmd_types")

    def configured(ep: bool, sp: bool) -> Any:
        def matrix(columns: int, rows: int) -> Any:
            given = {"weight": _init}
            return linear.Config(
                in_features=columns, out_features=rows, bias=False, param_init=given
            )

        sizes = {"dim": DIM, "num_experts": EXPERTS, "top_k": 2}
        found = configs.make_moe_config(
            num_experts=EXPERTS,
            router=configs.make_router_config(gate_param_init={"weight": _init}, **sizes),
            routed_experts=configs.make_routed_experts_config(
                hidden_dim=HIDDEN,
                param_init=dict.fromkeys(SHARDED, _init),
                comm_backend="standard",
                **sizes,
            ),
            shared_experts=dense.Config(
                w1=matrix(DIM, HIDDEN), w2=matrix(HIDDEN, DIM), w3=matrix(DIM, HIDDEN)
            ),
        )
        layout = {name: S(dim) for name, dim in SHARDED.items()}
        shard(found, enable_ep=ep, enable_sp=sp, expert_param_layout=layout)
        return found

    def target(
        mesh: DeviceMesh, *, batch: int = 4, sp: bool = True, backend: str = "spmd_types"
    ) -> Case:
        utils.set_spmd_backend(backend)
        ep, world = plan == "ep", mesh.size()
        if not ep and world > 1 and mesh["tp"].size() == 1:
            raise ValueError("plan tp needs tp > 1")
        moe = configured(ep, sp).build()
        moe.init_states(buffer_device=torch.device("cpu"))
        inside: Callable[[], Any] = nullcontext
        if world > 1:
            ranks = dims.ParallelDims(
                dp_replicate=1,
                dp_shard=mesh["dp"].size(),
                cp=1,
                tp=mesh["tp"].size(),
                pp=1,
                ep=world if ep else 1,
                world_size=world,
                spmd_backend=backend,
            )
            ranks.build_mesh()
            if backend == "spmd_types":
                over = ranks.spmd_dense_mesh()
                sparse = ranks.spmd_sparse_mesh() if ep else None
                typed.set_spmd_meshes(dense_mesh=over, sparse_mesh=sparse)
                inside = partial(typed.set_current_spmd_mesh, over)
            moe.parallelize(ranks)

        def call(x: torch.Tensor) -> object:
            with inside():
                return moe(x)

        names = {f"{_EXPERTS}.{n}": f"tp {dim}" for n, dim in SHARDED.items()}
        weights = {f"{_EXPERTS}.*": "dp 0, tp 0"} if ep else names
        weights["tokens_per_expert_E"] = "dp P, tp P" if ep else "dp P"
        x = torch.randn(batch, 8, DIM)
        words = "dp 0, tp 1" if sp else "dp 0"
        return Case(moe, (x,), (words,), call=call, trainer="sum dp", weights=weights)

    target.__qualname__ = f"torchtitan:moe --plan {plan}"
    vars(target).update(axes=("dp", "tp"), stand_ins=("float64", "histc", "grouped_mm"))
    vars(target)["patches"] = [
        (utils, "_spmd_backend", "spmd_types"),  # a target sets it
        (dims, "device_type", "cpu"),
    ]
    return target
