"""transformers 5.24.0: the eager experts of GPT-OSS cannot run under the EP plan `all_reduce`.

Routes to other ranks' experts get the id `num_experts`; its `one_hot` has no such class.
"""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh


def rank(number: int, store: str) -> None:
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.gpt_oss import modeling_gpt_oss as m

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    config = m.GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=8)
    config._experts_implementation = "eager"
    mlp = m.GptOssMLP(config)
    plan = {"experts": "ep_dispatch_experts"}
    plan |= {f"experts.{n}": "grouped_gemm" for n, _ in mlp.experts.named_parameters()}
    apply_expert_parallelism(mlp, mesh, mesh, plan, "all_reduce")
    mlp(torch.randn(1, 8, 16))  # RuntimeError: Class values must be smaller than num_classes.


if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
