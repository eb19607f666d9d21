"""What a checker still sees without our plugin: each marked line must be reported, no other."""

from __future__ import annotations

import torch
from torch import Tensor

from spmd_moe import DP, TP, MoEMesh, Placed, R, S, V, redistribute

mesh = MoEMesh.single()


def norm(x_TD: Placed[Tensor, DP[V], TP[V]]) -> Placed[Tensor, DP[V], TP[V]]:
    return x_TD


norm("tokens")  # E: arg-type
norm(torch.ones(2)).reshap(1)  # E: attr-defined
redistribute(torch.ones(2), mesh["tp"], src=R, dst=S(0))  # E: index
redistribute(torch.ones(2), mesh[TP], src="R", dst=S(0))  # E: arg-type
redistribute(torch.ones(2), mesh[TP], src=R)  # E: call-arg
_ = 1 + norm  # E: operator


def renamed(x: Placed[Tensr, TP[V]]) -> None:  # E: name-defined
    print(x)
