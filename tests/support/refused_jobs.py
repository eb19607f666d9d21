"""What several ranks together are refused for: the cases of `test_errors.py` that need some."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.distributed as dist

from spmd_moe import MoEMesh, SpmdMoeError
from spmd_moe.sanitize import sanitize
from tests.support.messages import Site, sites_passed
from tests.support.sanitized_job import Job
from tests.support.simulated_ranks import fake_world
from tests.support.workers import run


def disagreeing() -> tuple[str, list[Site]]:
    """On real ranks: each asks for another ep."""
    try:
        MoEMesh.init("cpu", dp=2, ep=1 + dist.get_rank())
    except SpmdMoeError as error:
        return str(error), sites_passed(error.__traceback__)
    raise AssertionError("ranks that disagree were not told")


def in_a_job(bug: str) -> tuple[str, list[Site]]:
    """On real ranks: the sanitizer finds a bug in the second step of a training job."""
    job = Job(bug, 1, dp=2, tp=2, ep=2, etp=2)
    try:
        with sanitize(job.model, job.mesh, 1.0):
            job.run(3)
    except SpmdMoeError as error:
        return str(error), sites_passed(error.__traceback__)
    raise AssertionError("the bug was not found")


# Messages that come of what several ranks do together: what they do, on how many ranks.
ON_RANKS: dict[str, Callable[[], tuple[str, list[Site]]]] = {
    "ranks_disagree": lambda: run(2, disagreeing)[0],
    "sanitize_boundary": lambda: run(4, in_a_job, "dropout")[0],
    "sanitize_state": lambda: run(4, in_a_job, "bias")[0],
    "sanitize_gradient": lambda: run(4, in_a_job, "router")[0],
    "sanitize_unreduced": lambda: run(4, in_a_job, "unreduced")[0],
    "sanitize_twice_reduced": lambda: run(4, in_a_job, "twice one")[0],
    "sanitize_no_sum": lambda: run(4, in_a_job, "sign")[0],
    "sanitize_parted": lambda: run(4, in_a_job, "ahead")[0],
}


def sanitized(rate: float = 1.0, twice: bool = False) -> None:
    with fake_world(2), ExitStack() as stack:
        mesh = MoEMesh.init("cpu", tp=2)
        for _ in range(1 + twice):
            stack.enter_context(sanitize(torch.nn.Linear(2, 2), mesh, rate))
