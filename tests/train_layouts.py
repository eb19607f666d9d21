"""One training run of the example on seven layouts: a table of the losses that came of it.

python -m tests.train_layouts      # some minutes on two cores

Layouts add in another order, so values differ in the last bits. Now and then two experts are so
close for a token that this decides between them; from there on the runs part. `moved` is the first
step in which a choice fell otherwise than in the first run, `before` the largest difference of the
losses up to there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = (1, 10, 30, 100)
SIZES = "--layers 2 --width 32 --hidden 32 --length 32 --batch 8 --megabytes 1 --no-check"
LAYOUTS = (  # ranks, and options
    (1, ""),
    (4, "--tp 1 --ep 1"),
    (4, "--tp 2 --ep 4"),
    (4, "--tp 4 --ep 2 --etp 2"),
    (4, "--tp 1 --ep 2 --fsdp"),
    (4, "--tp 2 --ep 4 --fsdp"),
    (8, "--tp 2 --ep 4 --fsdp"),
)


def trained(ranks: int, words: str, folder: Path) -> list[dict[str, Any]]:
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node={ranks}".split()
    train = [str(ROOT / "examples" / "train.py"), *SIZES.split(), *words.split()]
    subprocess.run(
        [sys.executable, *launcher, *train, "--steps", str(STEPS[-1]), "--out", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def main() -> None:
    print("| ranks | options |", " | ".join(f"loss {step}" for step in STEPS), "| moved | before |")
    print("| --- " * (len(STEPS) + 4) + "|", flush=True)
    first = list[dict[str, Any]]()
    for ranks, words in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            found = trained(ranks, words, Path(folder) / "run")
        first = first or found
        pairs = list(zip(found, first, strict=True))
        moved = next((i for i, (a, b) in enumerate(pairs) if a["counts"] != b["counts"]), None)
        off = max(abs(a["loss"] - b["loss"]) for a, b in pairs[:moved])
        cells = " | ".join(f"{found[step - 1]['loss']:.6f}" for step in STEPS)
        at = "never" if moved is None else moved + 1
        print(f"| {ranks} | {words or '-'} | {cells} | {at} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
