"""Faults of one of four ranks of the training example: a table of the messages and their times.

python -m tests.bench.train_faults [--write]      # 15 minutes on two cores
"""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import version

from tests.support.docs_blocks import DOCS, filled
from tests.support.train_faults import RANK, WHERE, run_with

NAMES = {"kill": "`kill -9`", "stop": "SIGSTOP", "full": "disk full"}
FAULTS = [(fault, where) for fault in ("stop", "kill") for where in WHERE] + [("full", "save")]


def row(fault: str, where: str) -> str:
    end = run_with(fault, where)
    hangs = [(at, text) for at, text in end.told if text.startswith("watch_hangs")]
    told = hangs or end.told
    if hangs:
        text = f"`{hangs[0][1].rpartition('; ')[2]}` by {len(hangs)} of 3 waiting ranks"
    elif fault == "full":
        text = f"`{told[0][1]}`" if told else "nothing"
    else:
        text = f"torchrun: `exitcode: -9) local_rank: {RANK}`"
    when = f"{told[0][0]:.1f} s" if told else ""
    cells = [NAMES[fault], where, text, when, f"{end.seconds:.1f} s", end.status, len(end.left)]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    head = "fault of rank 2 | in | message | first message after | job ended after | status"
    lines = [f"| {head} | processes left |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for fault in FAULTS:
        lines.append(row(*fault))
        print(lines[-1], flush=True)
    machine = f"{os.cpu_count()} cores (other jobs ran beside it), torch {version('torch')}"
    day = time.strftime("%Y-%m-%d")
    lines += ["", f"Measured on {day}, {machine}, by `python -m tests.bench.train_faults --write`."]
    if sys.argv[1:] == ["--write"]:
        page = DOCS / "training.md"
        page.write_text(filled(page.read_text(), "faults", "\n".join(lines)))


if __name__ == "__main__":
    main()
