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
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.moe.mappings import gather_tokens
    from deepspeed.utils import groups

    dist.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    deepspeed.ops.__compatible_ops__.clear()  # compile none of its C++ operators
    deepspeed.comm.comm.cdb = TorchBackend("gloo", None, None)
    groups.mpu = unit = types.SimpleNamespace()  # as Megatron gives it
    unit.get_tensor_model_parallel_world_size = lambda: 2
    unit.get_tensor_model_parallel_group = lambda: dist.group.WORLD
    gather_tokens(torch.randn(8, 4, 16), dim=1)  # RuntimeError: invalid tensor size


if __name__ == "__main__":
    mp.spawn(rank, (f"file://{sys.argv[1]}",), nprocs=2)
