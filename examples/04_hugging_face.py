"""Two models of transformers: load, train on four ranks, save, and load in transformers again.

    python examples/04_hugging_face.py                               # one process
    torchrun --nproc-per-node 4 examples/04_hugging_face.py          # experts shared out over 4
    ... examples/04_hugging_face.py --model path/to/Qwen3-30B-A3B    # a real one, from a folder

Without --model it makes two tiny models with random weights, Qwen3-MoE and DeepSeek-V3, and after
training compares every tensor that transformers loads with what one process would have.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import spmd_moe.hf as hf
from spmd_moe import DP, MoEMesh, reduce_gradients

SEQUENCES, LENGTH, RATE = 8, 16, 0.01
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True, "head_dim": 16},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint of transformers")
    parser.add_argument("--steps", type=int, default=2, help="steps of training (2)")
    options = parser.parse_args()
    try:
        import transformers
    except ModuleNotFoundError:
        sys.exit("this example needs transformers: pip install 'spmd-moe[hf]'")
    transformers.utils.logging.disable_progress_bar()

    mesh = join()
    with tempfile.TemporaryDirectory() as own:
        folder = Path(shared(own))
        if options.model is not None:
            train(options.model, folder / "trained", mesh, options.steps)
        for name in [] if options.model is not None else FAMILIES:
            if first(mesh):
                make(name, folder / name)
            barrier()
            loss = train(folder / name, folder / f"{name}-trained", mesh, options.steps)
            if first(mesh):
                compare(name, folder, options.steps, loss, mesh)
        barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def train(source: Path, target: Path, mesh: MoEMesh, steps: int) -> float:
    """The use of spmd_moe.hf: `swap` and `load`, training as ever, `save`. The last loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):  # no rank ever has all of it
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    hf.swap(model, mesh)
    read = hf.load(model, source, mesh)

    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    mine = batch(config.vocab_size).tensor_split(mesh[DP].size)[mesh[DP].rank]
    loss = torch.zeros(())
    for _ in range(steps):
        loss = model(mine, labels=mine, num_items_in_batch=SEQUENCES * (LENGTH - 1)).loss
        loss.backward()
        reduce_gradients(model, mesh)
        optimizer.step()
        optimizer.zero_grad()
    written = hf.save(model, target, mesh)
    print(f"rank {mesh[DP].rank}: read {read} bytes of {source.name}, wrote {written}", flush=True)
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)


# --- what the example is compared with ------------------------------------------------------------


def make(name: str, folder: Path) -> None:
    """A tiny model with random weights, written by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **SMALL, **FAMILIES[name])
    ).save_pretrained(folder)


def compare(name: str, folder: Path, steps: int, loss: float, mesh: MoEMesh) -> None:
    """The same steps by transformers alone; then every tensor of both."""
    from transformers import AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_pretrained(folder / name).train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=RATE)
    tokens = batch(alone.config.vocab_size)
    loss_alone = torch.zeros(())
    for _ in range(steps):
        loss_alone = alone(tokens, labels=tokens).loss
        loss_alone.backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"{name}-trained").state_dict()
    expected = alone.state_dict()
    assert loaded.keys() == expected.keys(), "transformers misses a tensor, or has one too many"
    off = max(float((loaded[key] - tensor).abs().max()) for key, tensor in expected.items())
    assert off < 1e-5 and abs(loss - float(loss_alone.detach())) < 1e-5, (off, loss)
    print(
        f"{name}: transformers loads all {len(loaded)} tensors; after {steps} steps they agree "
        f"with training without spmd_moe on one process (loss {loss:.4f})",
        flush=True,
    )


def batch(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, vocabulary, (SEQUENCES, LENGTH), generator=generator)


def join() -> MoEMesh:
    """All ranks that torchrun started: data parallel, and the experts over all; or this process."""
    if "WORLD_SIZE" not in os.environ:
        return MoEMesh.single()
    dist.init_process_group("gloo")
    return MoEMesh.init("cpu", dp=dist.get_world_size(), ep=dist.get_world_size())


def first(mesh: MoEMesh) -> bool:
    return mesh[DP].rank == 0


def shared(folder: str) -> str:
    """The folder of rank 0, on every rank."""
    names = [folder]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    return names[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
