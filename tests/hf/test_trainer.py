"""One step of transformers' own `Trainer` on a swapped model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spmd_moe.hf as hf
from spmd_moe import MoEMesh
from tests.hf.models import model_of, parts_beside, tokens


def sentences() -> list[dict[str, Tensor]]:
    """Sequences with different numbers of targets."""
    rows = []
    for number, ids in enumerate(tokens()):
        labels = ids.clone()
        labels[: 1 + number] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trained(model: Any, folder: Path) -> tuple[float, list[int]]:
    """The loss of one step of two microbatches, and what each was told of the number of targets."""
    from transformers import Trainer, TrainingArguments

    told: list[int] = []

    def hear(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        told.append(int(kwargs["num_items_in_batch"]))

    handle = model.register_forward_pre_hook(hear, with_kwargs=True)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        seed=0,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    data: Any = sentences()
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule))
    loss = trainer.train().training_loss
    handle.remove()
    return float(loss), told


def test_a_step_of_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    theirs = model_of("qwen3_moe")
    ours = hf.swap(copy.deepcopy(theirs), MoEMesh.single())
    before = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    expected, told_theirs = trained(theirs, tmp_path)
    loss, told = trained(ours, tmp_path)
    targets = sum(int((row["labels"][1:] != -100).sum()) for row in sentences())
    assert told == told_theirs == [targets] * 2
    assert loss == pytest.approx(expected, abs=2e-6)
    after = dict(theirs.named_parameters())
    for key, own, values in parts_beside(ours, MoEMesh.single(), after, lambda p: p.detach()):
        torch.testing.assert_close(own, values, atol=1e-6, rtol=0)
        assert not torch.equal(after[key], before[key]), key
