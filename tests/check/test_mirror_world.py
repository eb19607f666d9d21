"""Collectives of torch in the world of one real rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from spmd_moe.check.mirror_world import mirror_world


def test_collectives_of_lists_and_of_one_root() -> None:
    """The other ranks hold what this one holds, and send what it would send to itself."""
    with mirror_world(2, 1) as issued:
        parts = [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])]
        outs = [torch.zeros(2), torch.zeros(2)]
        dist.all_to_all(outs, parts)
        assert torch.stack(outs).tolist() == [[2, 3], [2, 3]]
        out = torch.zeros(2)
        dist.reduce_scatter(out, parts)
        assert out.tolist() == [4, 6]
        for root, due in ((1, 2.0), (0, 1.0)):
            x = torch.ones(1)
            dist.reduce(x, dst=root)
            assert float(x) == due
        dist.gather(torch.ones(2), outs, dst=1)
        dist.gather(torch.ones(2), None, dst=0)
        assert torch.stack(outs).tolist() == [[1, 1], [1, 1]]
        dist.scatter(out, parts, src=1)
        dist.scatter(out, None, src=0)
        assert out.tolist() == [2, 3]
    called = ["all_to_all", "reduce_scatter", *["reduce"] * 2, *["gather"] * 2, *["scatter"] * 2]
    assert [one.op for one in issued] == called
