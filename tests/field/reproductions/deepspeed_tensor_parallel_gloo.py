"""deepspeed 0.19.8: MoE beside tensor parallelism cannot run with gloo, its backend on CPUs.

`_gather_tokens` passes a flat output and an input with three dims to `all_gather_into_tensor`.
"""

import sys
import types

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(number: int, store: str) -> None:
    import deepspeed
    from deepspeed.moe.mappings import gather_tokens
    from deepspeed.utils import groups

    url = f"file://{store}"
    dist.init_process_group("gloo", init_method=url, rank=number, world_size=2)
    deepspeed.comm.comm.cdb = deepspeed.comm.torch.TorchBackend("gloo", None, None)
    unit = types.SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 2)
    unit.get_tensor_model_parallel_group = lambda: dist.group.WORLD
    groups.mpu = unit  # as Megatron gives it
    gather_tokens(torch.randn(8, 4, 16), dim=1)  # RuntimeError: invalid tensor size


if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
