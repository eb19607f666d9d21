"""`reduce_gradients`: memory while it runs, reads of the host, and what travels."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spmd_moe import CP, DP, TP, MoEMesh, Placed, R, reduce_gradients
from spmd_moe.train import gradients as gradients_file
from tests.support.pretended_device import on_device, pretended_device, to_device, values
from tests.support.workers import run

BUCKET = 1 << 12
Weight = Placed[Tensor, DP[R], CP[R], TP[R]]


class Model(nn.Module):
    """Parameters smaller and larger than a bucket, one of them transposed in memory."""

    small_AB: Weight
    large_AB: Weight
    turned_AB: Weight
    empty_AB: Weight

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.small_AB = nn.Parameter(torch.zeros(10, 10, dtype=dtype))
        self.large_AB = nn.Parameter(torch.zeros(300, 70, dtype=dtype))
        self.turned_AB = nn.Parameter(torch.zeros(20, 30, dtype=dtype).t())
        self.empty_AB = nn.Parameter(torch.zeros(0, 3, dtype=dtype))


class Memory(TorchDispatchMode):
    """The most bytes there were at a time, of storages that operators have made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return result


def _tensors(values: object) -> list[Tensor]:
    """Not those that only wrap one, as what waits for a collective does."""
    return [leaf for leaf in tree_leaves(values) if type(leaf) in (Tensor, nn.Parameter)]


def give(model: nn.Module, missing: str = "") -> None:
    """Small integers, so that sums are exact."""
    torch.manual_seed(dist.get_rank())
    for name, p in model.named_parameters():
        p.grad = None if name == missing else torch.randint_like(p, -4, 5)


def total(model: nn.Module) -> dict[str, Tensor]:
    """The sums of the gradients of all ranks, as torch takes them."""
    sums = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for grad in sums.values():
        dist.all_reduce(grad)
    return sums


def reduced(dtype: torch.dtype) -> tuple[int, bool]:
    """The most memory at a time, in buckets; and whether all sums are right."""
    mesh = MoEMesh.init("cpu", dp=dist.get_world_size())
    model = Model(dtype)
    give(model)
    want = total(model)
    reduce = gradients_file._reduce

    def one_by_one(*bucket: Any) -> None:
        reduce(*bucket)
        time.sleep(0.05)  # the thread of gloo lets go of a sum a moment after it is done

    with (
        mock.patch.object(gradients_file, "BUCKET_BYTES", BUCKET),
        mock.patch.object(gradients_file, "_reduce", one_by_one),
        Memory() as memory,
    ):
        reduce_gradients(model, mesh)
    right = all(
        torch.equal(p.grad, want[n]) for n, p in model.named_parameters() if p.grad is not None
    )
    return memory.most, right and len(want) == 4


@pytest.mark.gloo
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_two_buckets_are_there_at_a_time(dtype: torch.dtype) -> None:
    """Also of a gradient that is larger than a bucket, and of one in bfloat16, summed in float32.

    Beside them are a few numbers, which parameters have gradients; and a copy of the gradient that
    is not contiguous.
    """
    for most, right in run(2, reduced, dtype):
        assert right and BUCKET < most <= 2 * BUCKET + 600 * dtype.itemsize + 256


def partly_missing() -> tuple[list[str], bool]:
    """Rank 0 has no gradient of the largest parameter, and no rank one of the smallest."""
    mesh = MoEMesh.init("cpu", dp=dist.get_world_size())
    model = Model(torch.float32)
    with pretended_device() as log:
        to_device(model)
        for name, p in model.named_parameters():
            lacks = name == "small_AB" or (name == "large_AB" and dist.get_rank() == 0)
            p.grad = None if lacks else on_device(torch.ones(p.shape))
        log.take()
        reduce_gradients(model, mesh)
        waits = log.take()
        grads = [model.large_AB.grad, model.turned_AB.grad]
        ones = dist.get_world_size() - 1, dist.get_world_size()
        right = all(bool((values(g) == n).all()) for g, n in zip(grads, ones, strict=True))
    return waits, right and model.small_AB.grad is None


@pytest.mark.gloo
def test_one_read_where_gradients_are_missing() -> None:
    for waits, right in run(2, partly_missing):
        assert right and [wait.partition(" at ")[0] for wait in waits] == ["read by tolist"]


def twice(set_to_none: bool) -> list[str]:
    """The waits of the second step."""
    mesh = MoEMesh.init("cpu", dp=dist.get_world_size())
    model = Model(torch.float32)
    with pretended_device() as log:
        to_device(model)
        for _ in range(2):
            torch.autograd.backward([p.sum() for p in model.parameters()])
            log.take()
            reduce_gradients(model, mesh)
            waits = log.take()
            model.zero_grad(set_to_none)
    return waits


@pytest.mark.gloo
@pytest.mark.parametrize("set_to_none", [False, True])
def test_no_read_where_all_are_there(set_to_none: bool) -> None:
    """One to see that zero_grad has set what was summed to zero."""
    for waits in run(2, twice, set_to_none):
        assert len(waits) == (0 if set_to_none else 1), waits
