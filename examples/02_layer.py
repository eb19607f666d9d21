"""One Mixture-of-Experts layer on one process, and the same layer on four: they agree.

    python examples/02_layer.py                                  # one process
    torchrun --nproc-per-node 4 examples/02_layer.py             # dp 2 x tp 2, experts over 4 ranks
    torchrun --nproc-per-node 4 examples/02_layer.py --tp 4 --ep 2 --etp 2

Every run draws the same weights and the same batch, takes its part of both, and prints what all
ranks have together: the loss, the load of the experts, and the norm of every gradient. Then each
rank compares its own part of outputs and gradients with the whole layer, which it computes once
more alone.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from spmd_types import Shard
from torch import Tensor, nn

from spmd_moe import (
    CP,
    DP,
    TP,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    MoEOutput,
    P,
    Placement,
    R,
    RouterConfig,
    ShardShape,
    SharedConfig,
    balance_loss,
    expert_load,
    init_weights,
    redistribute,
    reduce_loss_terms,
)
from spmd_moe.core.placement import placements_of

BATCH, LENGTH, WIDTH = 4, 9, 32  # nine tokens do not divide by the ranks of tp
CONFIG = MoEConfig(
    dim=WIDTH,
    hidden_dim=48,
    router=RouterConfig(8, top_k=2, score_func="sigmoid", route_norm=True, dtype=torch.float64),
    shared=SharedConfig(hidden_dim=48, gated=True, sharded=True),
    balance="batch",
    src=I,  # outside of the layer all ranks of tp hold the same tokens
    dst=I,
)


def main() -> None:
    args = arguments()
    mesh = join(args)
    batch = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    layer, out, loss = step(mesh, own_part(batch, mesh))

    total = reduced(loss.detach(), Placement((DP[P], CP[P], TP[I])), mesh)
    say(f"{mesh}\nloss {float(total):.6f}\n{expert_load(out, mesh)}\nnorm of each gradient:")
    for name, parameter, placement in parameters(layer):
        say(f"  {name:<18} {norm(parameter, placement, mesh):.6f}   {placement}")

    rank, off = mesh_rank(), compare_with_whole(layer, out, mesh)
    if dist.is_initialized():
        dist.barrier()  # what rank 0 says alone comes first
    agreed = f"rank {rank}: outputs and gradients equal those of one process, within {off:.0e}"
    print(agreed, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2, help="ranks of tensor parallelism (2)")
    parser.add_argument("--ep", type=int, default=4, help="ranks that share out the experts (4)")
    parser.add_argument("--etp", type=int, default=1, help="ranks that share each expert (1)")
    return parser.parse_args()


def join(args: argparse.Namespace) -> MoEMesh:
    """All ranks that torchrun started, or this process alone."""
    if "WORLD_SIZE" not in os.environ:
        return MoEMesh.single()
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    return MoEMesh.init("cpu", dp=ranks // args.tp, tp=args.tp, ep=args.ep, etp=args.etp)


def own_part(batch: Tensor, mesh: MoEMesh) -> Tensor:
    """The sequences of this rank: the batch is shared out over dp, evenly or not."""
    dp = mesh[DP]
    return redistribute(
        batch, dp, src=R, dst=Shard(0), shape=ShardShape.even(BATCH, dp.size)
    ).contiguous()


def step(mesh: MoEMesh, x: Tensor) -> tuple[MoE, MoEOutput, Tensor]:
    """Forward and backward. The loss is P on dp, and the same on all ranks of tp.

    Every token is to come out as it went in: so it matters that it comes out in its own place.
    """
    layer = MoE(CONFIG, mesh).to(torch.float64)
    init_weights(layer, mesh, seed=0, std=0.2)
    x = x.to(torch.float64)
    out: MoEOutput = layer(x)
    assert out.losses is not None
    balance = balance_loss(out.losses, reduce_loss_terms(out.losses, mesh), mesh)
    loss = (out.hidden - x).square().sum() / (BATCH * LENGTH) + 0.01 * balance
    loss.backward()
    return layer, out, loss


def parameters(layer: MoE) -> list[tuple[str, nn.Parameter, Placement]]:
    """Each parameter with the placement that its class declares."""
    return [
        (f"{prefix}.{name}", parameter, placements_of(type(module))[name])
        for prefix, module in layer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def owed(parameter: nn.Parameter, placement: Placement, mesh: MoEMesh) -> Tensor:
    """The gradient with what it still owes paid: summed over every axis on which it is P.

    A gradient has the kind that belongs to its parameter's: R makes P, I makes I, S makes S.
    """
    assert parameter.grad is not None
    grad = parameter.grad
    for k in placement:
        if k.kind is R:
            grad = redistribute(grad, mesh[k.role], src=P, dst=R)
    return grad


def norm(parameter: nn.Parameter, placement: Placement, mesh: MoEMesh) -> float:
    """The norm of the whole gradient: the squares of shards are a sum over the axis."""
    square = owed(parameter, placement, mesh).square().sum()
    kinds = tuple(k.role[P] if isinstance(k.kind, Shard) else k for k in placement)
    return float(reduced(square, Placement(kinds), mesh).sqrt())


def reduced(x: Tensor, placement: Placement, mesh: MoEMesh) -> Tensor:
    for k in placement:
        if k.kind is P:
            x = redistribute(x, mesh[k.role], src=P, dst=R)
    return x


def compare_with_whole(layer: MoE, out: MoEOutput, mesh: MoEMesh) -> float:
    """The largest difference to this rank's part of what one process alone computes."""
    batch = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    whole, whole_out, _ = step(MoEMesh.single(), batch)
    off = apart(out.hidden, own_part(whole_out.hidden, mesh))
    theirs = {name: parameter.grad for name, parameter, _ in parameters(whole)}
    for name, parameter, placement in parameters(layer):
        part = theirs[name]
        assert part is not None
        for k in placement:
            if isinstance(k.kind, Shard):
                axis = mesh[k.role]
                part = part.chunk(axis.size, k.kind.dim)[axis.rank]
        off = max(off, apart(owed(parameter, placement, mesh), part))
    assert off < 1e-10, f"outputs or gradients differ by {off}"
    return off


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; none where a rank has no rows."""
    return max((ours - theirs).detach().abs().flatten().tolist(), default=0.0)


def mesh_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str) -> None:
    if mesh_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
