"""What a layer of one process keeps for backward, in bytes, beside the same in plain autograd."""

# Shape letters in this file:
#   T  tokens    K  experts per token    D  model width    E  experts    F  hidden width
#   N  slots that have an expert

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe import ExpertRecompute, MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
from tests.layer.test_experts_memory import hidden_of, saved_bytes

D, F, E, K = 256, 512, 8, 4


def composed(layer: MoE, x_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    """As it would be written without a thought of memory; padding has no expert."""
    experts, gate_ED = layer.experts, layer.router.weight_ED
    scores_TE = fn.linear(x_TD.float(), gate_ED.float()).softmax(1)
    scores_TK, ids_TK = scores_TE.topk(K)
    if mask_T is not None:
        ids_TK = ids_TK.masked_fill(~mask_T.unsqueeze(1), -1)
    ids = ids_TK.flatten()
    slot_N = ids.argsort(stable=True)[int((ids < 0).sum()) :]
    ends_E = ids[ids >= 0].bincount(minlength=E).cumsum(0).to(torch.int32)
    token_N = slot_N // K
    x_ND = x_TD[token_N]
    assert experts.w3_eFD is not None
    gate_NF = fn.grouped_mm(x_ND, experts.w1_eFD.mT, offs=ends_E)
    up_NF = fn.grouped_mm(x_ND, experts.w3_eFD.mT, offs=ends_E)
    y_ND = fn.grouped_mm(fn.silu(gate_NF) * up_NF, experts.w2_eDF.mT, offs=ends_E)
    y_ND = y_ND * scores_TK.flatten()[slot_N].unsqueeze(1).to(y_ND.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("tokens", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_of_a_layer(dtype: torch.dtype, tokens: int, padded: bool) -> None:
    for keep, most in ((ExpertRecompute.NONE, 0.45), (ExpertRecompute.FIRST_MATMULS, 0.02)):
        mesh = MoEMesh.single()
        layer = MoE(MoEConfig(D, F, RouterConfig(E, K), recompute=keep), mesh).to(dtype)
        init_weights(layer, mesh, seed=0, std=0.1)
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(0)).to(dtype)
        x.requires_grad_()
        mask = torch.arange(tokens) % 4 != 0 if padded else None
        given = [x, *layer.parameters(), *layer.buffers(), *([mask] if mask is not None else [])]
        want = composed(layer, x, mask)
        near = want.abs().max().item() * (1e-5 if dtype is torch.float32 else 5e-2)
        torch.testing.assert_close(layer(x, mask).hidden, want, rtol=0, atol=near)
        plain = saved_bytes(partial(composed, layer, x, mask), given)
        kept = saved_bytes(partial(hidden_of, layer, x, mask), given)
        assert 0 < kept <= most * plain, f"{kept / plain:.3f} of what plain autograd keeps"
