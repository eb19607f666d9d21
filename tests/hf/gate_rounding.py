"""The share of tokens for which a bfloat16 router and a float64 router choose differently.

python -m tests.hf.gate_rounding
"""

from __future__ import annotations

import dataclasses

import torch

from spmd_moe import MoEMesh, RouterConfig, init_weights
from spmd_moe.layer.router import Router

TOKENS, DIM = 4096, 1024
CONFIGS = {
    "softmax, 8 of 64": RouterConfig(64, 8),
    "softmax, 8 of 128": RouterConfig(128, 8),
    "softmax, 2 of 8": RouterConfig(8, 2),
}


def chosen(config: RouterConfig, dtype: torch.dtype) -> torch.Tensor:
    """The experts of each token, in order, for the same rounded tokens and weights."""
    mesh = MoEMesh.single()
    router = Router(config, DIM, mesh)
    init_weights(router, mesh, seed=0, std=0.02)
    x_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    router = router.to(torch.bfloat16).to(dtype)
    with torch.no_grad():
        found: torch.Tensor = router(x_TD.bfloat16().to(dtype)).expert_ids_TK.sort(1).values
    return found


def others(config: RouterConfig) -> tuple[float, float]:
    """The share of tokens that choose differently: a float32 router, and a bfloat16 router."""
    exact = chosen(dataclasses.replace(config, dtype=torch.float64), torch.float64)
    float32 = chosen(config, torch.bfloat16)
    bfloat16 = chosen(dataclasses.replace(config, in_model_dtype=True), torch.bfloat16)
    shares = [float((ids != exact).any(1).double().mean()) for ids in (float32, bfloat16)]
    return shares[0], shares[1]


if __name__ == "__main__":
    for name, config in CONFIGS.items():
        print(f"{name}: float32 {others(config)[0]:.2%}, bfloat16 {others(config)[1]:.2%}")
