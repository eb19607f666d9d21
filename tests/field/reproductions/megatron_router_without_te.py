"""megatron-core 0.16.1: without transformer_engine, no MoE router runs.

`moe_utils` reads `te_general_gemm`, which it defines only if transformer_engine can be imported.
"""

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear

if __name__ == "__main__":
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    router_gating_linear(x, weight, None, torch.float32)  # NameError: te_general_gemm
