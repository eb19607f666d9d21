"""Small parallel modules without types, as others write them; each can be built with a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Copy(torch.autograd.Function):
    """The same forward; all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Reduce(torch.autograd.Function):
    """All-reduce forward; the same backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Exchange(torch.autograd.Function):
    """Rows to other ranks and, backward, their gradients home."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sends: list[int], receives: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.how = receives, sends, group
        return exchange(x, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grad.contiguous(), *ctx.how), None, None, None


def exchange(x: Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out


# Without annotations torch's own `apply` is not typed.
copied: Callable[..., Tensor] = Copy.apply
reduced: Callable[..., Tensor] = Reduce.apply
exchanged: Callable[..., Tensor] = Exchange.apply


class MLP(nn.Module):
    """Column parallel, then row parallel. `fault` names what is wrong with it."""

    def __init__(self, dim: int, hidden: int, group: ProcessGroup, fault: str = "") -> None:
        super().__init__()
        self.group, self.fault = group, fault
        mine = hidden // group.size()
        self.up = nn.Parameter(torch.randn(mine, dim) * 0.3)
        self.down = nn.Parameter(torch.randn(dim, mine) * 0.3)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.fault != "input not reduced":
            x = copied(x, self.group)
        if self.fault == "input reduced twice":
            x = copied(x, self.group)
        y = F.linear(F.silu(F.linear(x, self.up)), self.down)
        if self.fault == "bias before the sum":
            y = y + self.bias
        if self.fault == "part of rank 1 missing" and self.group.rank() == 1:
            y = y * 0
        if self.fault != "output not reduced":
            y = reduced(y, self.group)
        if self.fault == "divided":
            y = y / self.group.size()
        return y if self.fault == "bias before the sum" else y + self.bias


class TPMoE(nn.Module):
    """Every rank has a piece of each expert's hidden dim; the router is on all of them."""

    def __init__(self, dim: int, hidden: int, group: ProcessGroup, fault: str = "") -> None:
        super().__init__()
        self.group, self.fault = group, fault
        mine = hidden // group.size()
        self.gate = nn.Linear(dim, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, mine, dim) * 0.3)
        self.down = nn.Parameter(torch.randn(4, dim, mine) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        if self.fault != "router not reduced":
            scores = copied(scores, self.group)
        best, ids = scores.topk(2, -1)
        rows = copied(x, self.group)
        hidden = F.silu(torch.einsum("td,ehd->teh", rows, self.up))
        out = torch.einsum("teh,edh->ted", hidden, self.down)
        picked = out.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
        return reduced((picked * best[..., None]).sum(1), self.group)


class EPMoE(nn.Module):
    """Experts over the ranks that have different tokens; raw all-to-all, one expert per token."""

    def __init__(self, dim: int, group: ProcessGroup, fault: str = "") -> None:
        super().__init__()
        self.group, self.fault, self.mine = group, fault, 4 // group.size()
        self.gate = nn.Linear(dim, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(self.mine, dim, dim) * 0.3)
        self.register_buffer("load_bias", torch.zeros(4))
        self.load_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        ids = (scores + self.load_bias).argmax(-1)
        counts = torch.bincount(ids, minlength=4)
        order = ids.argsort(stable=True)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        n = self.group.size()
        sends, receives = (c.view(n, -1).sum(1).tolist() for c in (counts, received))
        rows = exchanged(x[order], sends, receives, self.group)
        local = torch.arange(self.mine).repeat(n).repeat_interleave(received)
        out = torch.einsum("td,tdf->tf", rows, self.experts[local])
        if self.fault == "rank 1 answers with zeros" and self.group.rank() == 1:
            out = out * 0
        back = exchanged(out, receives, sends, self.group)
        inverse = order.argsort()
        if self.fault == "wrong order" and n > 1:
            inverse = order
        y: Tensor = back[inverse] * scores.gather(1, ids[:, None])
        if self.training:
            self._update(counts)
        return y

    def _update(self, counts: Tensor) -> None:
        counts = counts.to(torch.float64)
        if self.fault != "counts of this rank alone":
            dist.all_reduce(counts, group=self.group)
        self.load_bias += 0.01 * (counts.mean() - counts).sign()


class Block(nn.Module):
    """Plain modules; torch parallelizes them with DTensors."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.up(self.norm(x))))
        return y


def sharded(block: Block, mesh: DeviceMesh) -> Block:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(block, mesh["tp"], plan)
    return block


class DTensorGate(nn.Module):
    """A gate whose score weighs a sharded product; `to_local` says how its gradient lies."""

    def __init__(self, dim: int, hidden: int, mesh: DeviceMesh, fault: str = "") -> None:
        super().__init__()
        self.mesh, self.fault = mesh["tp"], fault
        torch.manual_seed(0)
        whole = DTensor.from_local(torch.randn(1, dim), self.mesh, [Replicate()], run_check=False)
        self.gate = nn.Parameter(whole)
        n = self.mesh.size()
        up = torch.randn(hidden // n, dim) * 0.3
        down = torch.randn(dim, hidden // n) * 0.3
        self.up: Any = nn.Parameter(DTensor.from_local(up, self.mesh, [Shard(0)], run_check=False))
        self.down: Any = nn.Parameter(
            DTensor.from_local(down, self.mesh, [Shard(1)], run_check=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        whole: Any = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        grads = None if self.fault == "gate not reduced" else [Partial()]
        logits: Any = F.linear(whole, self.gate)
        score = logits.sigmoid().to_local(grad_placements=grads)
        rows = whole.to_local(grad_placements=[Partial()])
        hidden = F.silu(F.linear(rows, self.up.to_local()))
        part = score * F.linear(hidden, self.down.to_local())
        out = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return out.redistribute(placements=[Replicate()])
