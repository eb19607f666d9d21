"""The training example, with a note of the closest choice that each router makes in each step.

    torchrun --nproc-per-node 4 -m tests.support.train_watched --out folder  # and its options

Each rank writes `closest-RANK.jsonl`: for each layer, in order, the two experts between which a
choice was closest among its tokens, the one that was taken first, and what spoke for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import train
from torch import Tensor
from train_model import Model, build

from spmd_moe import MoEMesh
from spmd_moe.layer.router import Router, Routing


def closest(router: Router, routing: Routing) -> dict[str, Any] | None:
    """The last expert that was taken and the first that was not, where they are most alike."""
    if routing.logits_TE.shape[0] == 0:
        return None
    k = router.config.top_k
    best = (router.score.of_logits(routing.logits_TE) + router.bias_E).topk(k + 1)
    at = int((best.values[:, k - 1] - best.values[:, k]).argmin())
    return {
        "experts": best.indices[at, k - 1 : k + 1].tolist(),
        "scores": best.values[at, k - 1 : k + 1].tolist(),
    }


def watched(mesh: MoEMesh, **settings: Any) -> Model:
    model = build(mesh, **settings)
    folder = Path(sys.argv[sys.argv.index("--out") + 1])
    file = (folder / f"closest-{train.RANK}.jsonl").open("w", buffering=1)

    def note(router: Router, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        file.write(json.dumps(closest(router, routing)) + "\n")

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    return model


if __name__ == "__main__":
    train.build = watched
    train.main(sys.argv[1:])
