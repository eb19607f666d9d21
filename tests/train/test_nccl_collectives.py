"""Every collective of a training step is one that NCCL has: seen operator by operator on gloo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spmd_moe import (
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    SharedConfig,
    balance_loss,
    clip_grad_norm_,
    expert_load,
    init_weights,
    parallelize,
    reduce_gradients,
    reduce_loss_terms,
    sanitize,
    update_selection_bias,
    z_loss,
)
from tests.support.dispatchers import DISPATCHERS, SHARDED
from tests.support.simulated_ranks import fake_world
from tests.support.workers import run

DTYPES = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool}
DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}
CONFIG = MoEConfig(
    8, 16, RouterConfig(8, top_k=2), src=I, dst=I, shared=SharedConfig(16), balance="batch"
)
DEGREES = {"dp": 2, "tp": 2, "ep": 2, "etp": 2}


@dataclass(frozen=True)
class Issued:
    """A collective, and the tensors that it was given."""

    name: str
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    contiguous: bool
    ranks: int  # of its group, 0 where the operator does not name it


class Collectives(TorchDispatchMode):
    """All collectives that are issued in the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.issued: list[Issued] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        waits = name.startswith(("wait_tensor", "_wrap_tensor"))
        if namespace in ("_c10d_functional", "c10d") and not waits:
            leaves = tree_leaves((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            groups = [leaf for leaf in leaves if isinstance(leaf, str) and leaf.isdigit()]
            named: Any = distributed_c10d._resolve_process_group  # by a str of a type of its own
            ranks = [named(group).size() for group in groups]
            self.issued.append(
                Issued(
                    name.partition(".")[0],
                    tuple(t.numel() for t in tensors),
                    tuple(t.dtype for t in tensors),
                    all(t.is_contiguous() for t in tensors),
                    max(ranks, default=0),
                )
            )
        return func(*args, **(kwargs or {}))


def trained(name: str, tokens: int, dtype: torch.dtype) -> list[Issued]:
    """A step with the sanitizer; the ranks of the last dp place have no tokens."""
    mesh = MoEMesh.init("cpu", **DEGREES)
    layer = MoE(CONFIG, mesh, DISPATCHERS[name](mesh, 8))
    init_weights(layer, mesh, seed=0)
    layer.to(dtype)
    mine = 0 if dist.get_rank() >= 2 else tokens
    with Collectives() as seen, sanitize(layer, mesh, rate=1.0):
        out = layer(torch.randn(mine, 8).to(dtype))
        assert out.losses is not None
        total = reduce_loss_terms(out.losses, mesh)
        loss = out.hidden.float().sum() + balance_loss(out.losses, total, mesh)
        (loss + z_loss(out.losses, total)).backward()
        expert_load(out, mesh)
        reduce_gradients(layer, mesh)
        clip_grad_norm_(layer, mesh, 1.0, math.inf)
        update_selection_bias([layer.router], mesh, 0.01)
    issued: list[Issued] = seen.issued
    return issued


def unknown_to_nccl(issued: Issued) -> bool:
    """Another dtype, rows that are not packed, or nothing where something is expected.

    NCCL skips an empty exchange of rows: each rank knows from the sizes that nothing comes.
    """
    empty = min(issued.sizes, default=0) == 0 and not issued.name.startswith("all_to_all")
    return not set(issued.dtypes) <= DTYPES or not issued.contiguous or empty


@pytest.mark.gloo
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("name", SHARDED)
def test_a_step(name: str, tokens: int) -> None:
    of_ranks = run(4, trained, name, tokens, torch.bfloat16)
    for issued in of_ranks:
        assert len(issued) > 20 and [i for i in issued if unknown_to_nccl(i)] == []
        assert any(i.ranks > 1 for i in issued)
        assert all(i.ranks != 1 for i in issued), "a group of one rank would make a communicator"
        # All ranks issue as many of each kind: none is left alone in one.
        assert [i.name for i in issued] == [i.name for i in of_ranks[0]]


def test_what_nccl_lacks_is_seen() -> None:
    """So the test above can fail."""
    f16, ok = torch.bfloat16, Issued("all_reduce", (3,), (torch.float32,), True, 2)
    assert not unknown_to_nccl(ok)
    assert unknown_to_nccl(Issued("all_reduce", (3,), (torch.complex64,), True, 2))
    assert unknown_to_nccl(Issued("all_reduce", (3,), (f16,), False, 2))
    assert unknown_to_nccl(Issued("all_gather_into_tensor", (0,), (f16,), True, 2))


# --- communicators ------------------------------------------------------------------------------


def groups() -> list[int]:
    """The sizes of the process groups of this rank, of which each is a communicator once used."""
    return sorted(dist.get_world_size(g) for g in distributed_c10d._world.pg_map)


@pytest.mark.parametrize(
    ("degrees", "made", "stored"),
    [
        ({"dp": 4, "tp": 4, "ep": 4, "etp": 2}, [2, 2, 4, 4, 4], [2, 4]),
        ({"dp": 16, "ep": 8}, [2, 8], [2]),
    ],
    ids=str,
)
def test_how_many_groups_a_rank_is_in(
    degrees: dict[str, int], made: list[int], stored: list[int]
) -> None:
    """Besides that of all ranks, and those of one rank, in which nothing is ever sent.

    `parallelize` makes groups for what FSDP gathers, which then does not wait for the layer's
    exchanges; one for each kind of parameter, experts and the others.
    """
    with fake_world(16):
        mesh = MoEMesh.init("cpu", **degrees)
        assert [size for size in groups() if 1 < size < 16] == made
        layer = MoE(CONFIG, mesh)
        assert [size for size in groups() if 1 < size < 16] == made, "a layer makes none"
        parallelize(layer, mesh)
        assert [size for size in groups() if 1 < size < 16] == sorted([*made, *stored])
        assert groups()[-1] == 16 and groups().count(16) == 1


def test_what_construction_exchanges() -> None:
    """Settings are compared, by the mesh over all ranks, then along each dense axis."""
    with fake_world(16), Collectives() as seen:

        def issued() -> list[str]:
            found, seen.issued = [i.name for i in seen.issued], []
            return found

        mesh = MoEMesh.init("cpu", dp=4, tp=4, ep=4, etp=2)
        assert issued() == ["allgather_"]
        layer = MoE(CONFIG, mesh)
        assert issued() == ["allgather_"] * 4, "the layer, and its dispatcher"
        init_weights(layer, mesh, seed=0)
        assert issued() == ["allgather_"] * 2
        parallelize(layer, mesh)
        assert issued() == ["allgather_"] * 2
