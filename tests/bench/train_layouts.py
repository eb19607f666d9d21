"""One training run of the example on seven layouts: a table of the losses that came of it.

python -m tests.bench.train_layouts [--write]      # 15 minutes on two cores

Layouts add in another order, so values differ in the last bits. Now and then two experts are so
close for a token that this decides between them; from there on the runs part. The script then says
which two, and what spoke for each. In float64, where the last bits are 1e-16, none may part.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.docs_blocks import DOCS, ROOT, filled

STEPS = 100
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


@dataclass(frozen=True)
class Run:
    """What a run says of its mesh, its metrics, and the closest choices: of each step and layer."""

    mesh: str
    steps: list[dict[str, Any]]
    closest: list[list[dict[str, Any]]]

    @property
    def loss(self) -> float:
        return float(self.steps[-1]["loss"])


def trained(ranks: int, words: str, folder: Path) -> Run:
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node={ranks}".split()
    program = ["-m", "tests.support.train_watched", *SIZES.split(), *words.split()]
    done = subprocess.run(
        [sys.executable, *launcher, *program, "--steps", str(STEPS), "--out", str(folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    mesh = re.search(r"MoEMesh\((.*?)\)", done.stdout)
    assert mesh is not None, done.stdout
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return Run(mesh[1], steps, _closest(folder, len(steps[0]["counts"])))


def _closest(folder: Path, layers: int) -> list[list[dict[str, Any]]]:
    ranks = [
        [json.loads(line) for line in path.open()] for path in sorted(folder.glob("closest-*"))
    ]
    notes = [
        min(filter(None, of_ranks), key=lambda note: note["scores"][0] - note["scores"][1])
        for of_ranks in zip(*ranks, strict=True)
    ]
    return [notes[i : i + layers] for i in range(0, len(notes), layers)]


def parted(words: str, run: Run, first: Run) -> list[str]:
    """Where a choice fell otherwise than in the first run, and how close it was in both."""
    for number, (mine, theirs) in enumerate(zip(run.steps, first.steps, strict=True)):
        for layer, (a, b) in enumerate(zip(mine["counts"], theirs["counts"], strict=True)):
            if a != b:
                here, there = (_told(r.closest[number][layer]) for r in (run, first))
                at = f"step {number + 1}, layer {layer}"
                return [f"With `{words}` a choice moved at {at}: {here}; in the first run {there}."]
    return []


def _told(note: dict[str, Any]) -> str:
    (taken, left), (more, less) = note["experts"], note["scores"]
    return f"expert {taken} ({more:.9f}) before {left} ({less:.9f})"


def table() -> str:
    head = f"loss after {STEPS} steps | from the first | in float64, from the first"
    lines = [f"| mesh | options | {head} |", "| --- | --- | --- | --- | --- |"]
    first, notes = list[Run](), list[str]()
    for ranks, words in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            both = [
                trained(ranks, f"{words} {more}", Path(folder) / f"run{more}")
                for more in ("", "--double")
            ]
        first = first or both
        off, off_double = (abs(a.loss - b.loss) for a, b in zip(both, first, strict=True))
        cells = f"{both[0].loss:.6f} | {off:.1e} | {off_double:.1e}"
        lines.append(f"| {both[0].mesh} | {f'`{words}`' if words else ''} | {cells} |")
        found = [text for a, b in zip(both, first, strict=True) for text in parted(words, a, b)]
        print(lines[-1], *found, sep="\n", flush=True)
        notes += found
    return "\n".join([*lines, "", measured(), *notes])


def measured() -> str:
    """The machine, the date and the command, as each table of numbers has them."""
    machine = f"{os.cpu_count()} cores, torch {version('torch')}"
    command = "`python -m tests.bench.train_layouts --write`"
    return f"Measured on {time.strftime('%Y-%m-%d')}, {machine}, by {command}."


def main() -> None:
    found = table()
    print(found)
    if sys.argv[1:] == ["--write"]:
        page = DOCS / "training.md"
        page.write_text(filled(page.read_text(), "losses", found))


if __name__ == "__main__":
    main()
