"""Checks of the GPU of a rank: it exists, torch supports it, and capabilities agree."""

from __future__ import annotations

import os
import re

import torch
import torch.distributed as dist

from spmd_moe.core.errors import MeshError, explain, plural

_NOT_REAL = ("fake", "threaded", "mirror")  # backends that simulate GPUs


def _on_gpus(device_type: str) -> bool:
    return device_type == "cuda" and dist.get_backend() not in _NOT_REAL


def check_device_of_rank(where: str, device_type: str) -> None:
    """Raise on all ranks of a machine if it has too few GPUs for them."""
    if not _on_gpus(device_type):
        return
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if have == 0:
        raise MeshError(
            explain(
                where,
                "device_type is 'cuda', and torch sees no GPU",
                why="every rank computes on a GPU of its own",
                fixes=[
                    "'cpu'   # and init_process_group('gloo')",
                    "nvidia-smi   # lists the GPUs; CUDA_VISIBLE_DEVICES may hide some",
                ],
            )
        )
    if here > have:
        raise MeshError(
            explain(
                where,
                f"this machine has {plural(here, 'rank')} and {plural(have, 'GPU')}",
                why="every rank computes on a GPU of its own, and NCCL refuses to share one",
                fixes=[f"torchrun --nproc-per-node {have}"],
            )
        )


def settings_of_device(device_type: str) -> dict[str, object]:
    """Settings that must be equal on all ranks, read after the device of this rank is set."""
    if not _on_gpus(device_type):
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"gpu_capability": f"{major}.{minor}"}


def check_capability(where: str, device_type: str) -> None:
    """Raise if torch has no kernels for the GPU, whose capability is the same on all ranks."""
    if not _on_gpus(device_type):
        return
    major, minor = torch.cuda.get_device_capability()
    built = [re.fullmatch(r"sm_(\d+)[a-z]?", arch) for arch in torch.cuda.get_arch_list()]
    oldest = min((int(match[1]) for match in built if match), default=0)
    if major * 10 + minor < oldest:
        raise MeshError(
            explain(
                where,
                f"the GPUs have capability {major}.{minor}, and this torch is built for "
                f"{oldest // 10}.{oldest % 10} and later",
                why="it has no kernels for them",
                fixes=["'cpu'", "a build of torch for these GPUs"],
            )
        )
