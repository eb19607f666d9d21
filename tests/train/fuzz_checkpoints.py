"""Mutations of checkpoints: none may load as anything that was not saved, or raise anything else.

    python -m tests.train.fuzz_checkpoints --seconds 3600 --seed 1

`test_checkpoint_fuzz.py` runs a few thousand of them with a fixed seed. Two kinds:

- damage: bytes of the index and of the data are changed, cut, doubled or taken from another
  checkpoint. It either loads as it was saved, or raises CheckpointError.
- forgery: values in the index are changed, and its digest is made again. That is another valid
  checkpoint if it loads: then what it loads depends on its files alone, never on what the model
  had before. Else it raises CheckpointError.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmd_moe import (
    CheckpointError,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    init_weights,
    load_checkpoint,
    save_checkpoint,
)
from spmd_moe.check.thread_ranks import threaded

State: TypeAlias = dict[str, Any]
MESH = MoEMesh.single()
EXTRA = {"step": 100, "note": [1.5, None, {"deep": True}]}


def made(seed: int, mesh: MoEMesh = MESH) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer and an optimizer that has a state."""
    layer = MoE(MoEConfig(4, 8, RouterConfig(2, 1)), mesh)
    init_weights(layer, mesh, seed=seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01 * (1 + seed))
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return layer, optimizer


def state_of(layer: nn.Module, optimizer: torch.optim.Optimizer, extra: object) -> State:
    """Everything that a load sets, in a form that compares."""
    found: State = {name: value.clone() for name, value in layer.state_dict().items()}
    for name, parameter in layer.named_parameters():
        found |= {f"{name}:{k}": copy.copy(v) for k, v in optimizer.state[parameter].items()}
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return found | {"settings": repr(settings), "extra": repr(extra), "seed": torch.rand(4)}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype is b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return repr(a) == repr(b)


def save_on_ranks(folder: str) -> None:
    """Two checkpoints of two ranks, which one process can load."""
    mesh = MoEMesh.init("cpu", dp=2, ep=2)
    for seed in (0, 1):
        layer, optimizer = made(seed, mesh)
        dist.barrier()
        save_checkpoint(f"{folder}/ranks{seed}", layer, mesh, optimizer, EXTRA)


class Fuzz:
    """Good checkpoints, what they load as, and the mutations."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        threaded(2, save_on_ranks, str(folder))
        for number in (0, 1):
            layer, optimizer = made(number)
            save_checkpoint(folder / f"one{number}", layer, MESH, optimizer, EXTRA)
        self.good = {n: self._loaded(folder / n, 5) for n in ("one0", "one1", "ranks0", "ranks1")}
        self.counts: Counter[str] = Counter()

    def _loaded(self, path: Path, seed: int) -> State:
        layer, optimizer = made(seed)
        torch.manual_seed(seed)
        extra = load_checkpoint(path, layer, MESH, optimizer)
        return state_of(layer, optimizer, extra)

    def once(self) -> None:
        """One mutation of one checkpoint."""
        base = self.draw.choice(("one0", "ranks0"))
        path = self.folder / "mutated"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.folder / base, path)
        mutate: Callable[[Path, str], object] = self.draw.choice((*[self.damage] * 2, self.forge))
        what = mutate(path, base)
        try:
            found = self._loaded(path, 5)
        except CheckpointError:
            self.counts["refused"] += 1
            return
        if mutate == self.damage:
            assert same(found, self.good[base]), f"{base} loads as what was not saved: {what}"
        else:
            other = self._loaded(path, 6)
            assert same(found, other), f"{base} leaves what the model had: {what}"
        self.counts["loaded"] += 1

    # --- damage -------------------------------------------------------------------------------

    def damage(self, path: Path, base: str) -> object:
        file = self.draw.choice(sorted(path.iterdir()))
        data = bytearray(file.read_bytes())
        at, how = self.draw.randrange(len(data)), self.draw.randrange(8)
        if how == 0:
            data[at] ^= 1 << self.draw.randrange(8)
        elif how == 1:
            data[at] = self.draw.randrange(256)
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : at + self.draw.randint(1, 40)]
        elif how == 4:
            data[at:at] = data[at : at + self.draw.randint(1, 40)]
        elif how == 5:
            size, to = self.draw.randint(1, 64), self.draw.randrange(len(data))
            data[to : to + size] = data[at : at + size]
        elif how == 6:  # a file of the other checkpoint
            data = bytearray((self.folder / (base[:-1] + "1") / file.name).read_bytes())
        else:  # two files of this one change places
            twin = self.draw.choice(sorted(path.iterdir()))
            content = twin.read_bytes()
            twin.write_bytes(data)
            data = bytearray(content)
        file.write_bytes(data)
        return file.name, at, how

    # --- forgery ------------------------------------------------------------------------------

    def forge(self, path: Path, base: str) -> object:
        text = (path / "index.json").read_bytes()
        index = json.loads(text)["index"]
        told = [self._change(index) for _ in range(self.draw.randint(1, 3))]
        body = json.dumps(index).encode()
        head = text.partition(b'"sha256": "')[0] + b'"sha256": "'
        digest = hashlib.sha256(body).hexdigest().encode()
        (path / "index.json").write_bytes(head + digest + b'", "index": ' + body + b"}")
        return told

    def _change(self, index: Any) -> object:
        """Something, somewhere in it: a key, a value, or two values that change places."""
        places = list(_places(index))
        holder, key = self.draw.choice(places)
        how = self.draw.randrange(5)
        if key not in (holder if isinstance(holder, dict) else range(len(holder))):
            return None
        if how == 0:
            del holder[key]
        elif how == 1:
            holder[key] = self._odd(holder[key])
        elif how == 2:
            other, there = self.draw.choice(places)
            if there in (other if isinstance(other, dict) else range(len(other))):
                holder[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[key])
        elif how == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif isinstance(holder, dict):
            holder[self.draw.choice([f"{key}x", "lr", "params", "weight"])] = holder[key]
        return how, key

    def _odd(self, value: Any) -> Any:
        numbers = [0, 1, -1, 2, 0.5, 1e300, 10**9, 2**31, 2**53, 2**63, 10**30, -(10**30)]
        near = [value + 1, value - 1, value * 2, -value] if type(value) is int else []
        texts = [
            "",
            "F32",
            "I64",
            "rank1.safetensors",
            "../x",
            "a\0b",
            "x" * 5000,
            "cpu",
            "float32",
        ]
        odd: list[Any] = [
            None,
            True,
            [],
            {},
            [value],
            {"value": value},
            [[]] * 70,
            {"__float__": "inf"},
        ]
        return self.draw.choice([*numbers, *near * 3, *texts, *odd])


def _places(value: Any) -> Any:
    """Every key of every object and list in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def fuzz(
    folder: Path, seed: int, *, times: int | None = None, seconds: float = 0.0
) -> Counter[str]:
    """Either so many mutations, or for so long."""
    torch.set_num_threads(1)
    job, end = Fuzz(folder, seed), time.monotonic() + seconds
    done = 0
    while done < times if times is not None else time.monotonic() < end:
        job.once()
        done += 1
    return job.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(fuzz(Path(folder), asked.seed, seconds=asked.seconds)))


if __name__ == "__main__":
    main()
