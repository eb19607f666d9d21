"""What the checks are pointed at: the layer in several configurations, and the small modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from spmd_moe.check import Case
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DP, EDP, EP, ETP, TP, I, Placed, R, S, V
from spmd_moe.layer.dispatch import AllGather
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import MoEConfig, SharedConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.train.init_weights import init_weights
from tests.catalogue import parts, styles
from tests.catalogue.data import cell_rows, drawn, own_rows

WIDTH, HIDDEN, EXPERTS = 8, 8, 4
OWN = Placed[Tensor, DP[V], CP[V], TP[S[0]]]
WHOLE = Placed[Tensor, DP[V], CP[V], TP[R]]
SAME = Placed[Tensor, DP[V], CP[V], TP[I]]


def made(mesh: MoEMesh, gather: bool = False, **config: Any) -> MoE:
    settings: dict[str, Any] = {"router": RouterConfig(EXPERTS, 2), "balance": "batch"} | config
    dispatcher = AllGather(mesh, EXPERTS) if gather else None
    module = MoE(MoEConfig(WIDTH, HIDDEN, **settings), mesh, dispatcher)
    init_weights(module, mesh, seed=0, std=0.5)
    return module


def layer(mesh: MoEMesh, tokens: int) -> Case:
    """Each rank has tokens of its own; the experts are reached by an exchange."""
    return Case(made(mesh), (own_rows(cell_rows(mesh, tokens, WIDTH), mesh),), (OWN,))


def gathering(mesh: MoEMesh, tokens: int) -> Case:
    """The same with the tokens gathered."""
    x = own_rows(cell_rows(mesh, tokens, WIDTH), mesh)
    return Case(made(mesh, gather=True), (x,), (OWN,))


def whole(mesh: MoEMesh, tokens: int) -> Case:
    """Every rank of tp comes with all tokens of its cell."""
    return Case(made(mesh, src=R, dst=I), (cell_rows(mesh, tokens, WIDTH),), (WHOLE,))


def shared(mesh: MoEMesh, tokens: int) -> Case:
    module = made(mesh, shared=SharedConfig(HIDDEN, sharded=True))
    return Case(module, (own_rows(cell_rows(mesh, tokens, WIDTH), mesh),), (OWN,))


def biased(mesh: MoEMesh, tokens: int) -> Case:
    module = made(mesh, bias=True)
    for name, p in module.experts.named_parameters():
        if name.startswith("b"):
            torch.nn.init.constant_(p, 0.5)
    return Case(module, (own_rows(cell_rows(mesh, tokens, WIDTH), mesh),), (OWN,))


def masked(mesh: MoEMesh, tokens: int) -> Case:
    """With padding, and whole tokens on every rank of tp."""
    x = cell_rows(mesh, tokens, WIDTH)
    mask = torch.arange(tokens) % 3 != 1
    return Case(made(mesh, src=R, dst=R), (x, mask), (WHOLE, WHOLE))


# --- small modules of the tests ---------------------------------------------------------------


def gather_ep(mesh: MoEMesh, tokens: int) -> Case:
    _only(mesh[ETP].size == mesh[TP].size == 1, "ranks of ep have tokens of their own")
    x = cell_rows(mesh, tokens, WIDTH)
    module = styles.GatherEP(mesh, EXPERTS, WIDTH, HIDDEN)
    return Case(module, (x,), (styles.Rows,))


def sharded_tp(mesh: MoEMesh, tokens: int) -> Case:
    _only(mesh[EP].size == 1, "it has no ep")
    module = styles.ShardedTP(mesh, EXPERTS, WIDTH, HIDDEN)
    return Case(module, (cell_rows(mesh, tokens, WIDTH),), (SAME,))


def on_dtensors(mesh: MoEMesh, tokens: int) -> Case:
    _only(mesh[EP].size == mesh[ETP].size == mesh[DP].size * mesh[CP].size == 1, "tp alone")
    x = cell_rows(mesh, tokens, WIDTH)
    module = styles.OnDTensors(mesh, EXPERTS, WIDTH, HIDDEN)
    placed = DTensor.from_local(x, mesh.dense["tp"], [Replicate()], run_check=False)
    return Case(module, (placed,))


def experts_on_tp(mesh: MoEMesh, tokens: int) -> Case:
    module = parts.ExpertsOnTP(mesh, EXPERTS, WIDTH)
    return Case(module, (cell_rows(mesh, tokens, WIDTH),), (SAME,))


def batched(mesh: MoEMesh, tokens: int) -> Case:
    x = cell_rows(mesh, 2 * tokens, WIDTH).unflatten(0, (2, tokens))
    return Case(parts.Batched(mesh, WIDTH), (x,), (WHOLE,))


def capacity(mesh: MoEMesh, tokens: int) -> Case:
    module = parts.Capacity(mesh, EXPERTS, WIDTH)
    return Case(module, (cell_rows(mesh, tokens, WIDTH),), (WHOLE,))


def clip_norm(mesh: MoEMesh, tokens: int) -> Case:
    """Its arguments are gradients, not tokens."""
    ep = mesh[EP]
    _only(mesh[ETP].size == 1, "experts are whole")
    own = drawn(1, EXPERTS, WIDTH).chunk(ep.size)[ep.rank].contiguous()
    grads = drawn(2, WIDTH), own
    return Case(parts.ClipNorm(mesh), grads, (parts.Dense, parts.Expert))


def lora(mesh: MoEMesh, tokens: int) -> Case:
    etp = mesh[ETP]
    h = cell_rows(mesh, tokens, WIDTH).chunk(etp.size, 1)[etp.rank].contiguous()
    return Case(parts.Lora(mesh, WIDTH), (h,), (Placed[Tensor, EDP[V], EP[V], ETP[S[1]]],))


def bias_update(mesh: MoEMesh, tokens: int) -> Case:
    x = own_rows(cell_rows(mesh, tokens, WIDTH), mesh)
    return Case(parts.BiasUpdate(mesh, EXPERTS, WIDTH), (x,), (OWN,))


def metrics(mesh: MoEMesh, tokens: int) -> Case:
    x = own_rows(cell_rows(mesh, tokens, WIDTH), mesh)
    return Case(parts.Metrics(mesh, EXPERTS, WIDTH), (x,), (OWN,))


def padded(mesh: MoEMesh, tokens: int) -> Case:
    """Padding holds no numbers at all."""
    x = own_rows(cell_rows(mesh, tokens, WIDTH), mesh)
    valid = torch.arange(x.shape[0]) % 2 == 0
    x = torch.where(valid.unsqueeze(-1), x, torch.nan)
    return Case(parts.PaddedCombine(mesh, EXPERTS, WIDTH), (x, valid), (OWN, OWN))


def step(mesh: MoEMesh, tokens: int) -> Case:
    x = own_rows(cell_rows(mesh, tokens, WIDTH), mesh)
    return Case(parts.Step(made(mesh)), (x,), (OWN,))


def _only(possible: bool, why: str) -> None:
    if not possible:
        raise ValueError(why)
