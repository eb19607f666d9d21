"""Checks that need a GPU, on one or more, in one table. Time limits add up to 380 s.

python -m tests.bench.gpu                   # prints the table
python -m tests.bench.gpu --write           # and puts it in docs/gpus.md
python -m tests.bench.gpu --only waits

Each item runs in its own process and has a time limit; a failure is a row of the table. On a CPU,
items run without the parts that need CUDA, in about a minute.
"""

from __future__ import annotations

import argparse
import os
from datetime import date

import torch

from tests.bench.gpu import on_one, on_ranks
from tests.bench.gpu.run_items import Item, run_item, run_items, table
from tests.bench.layer import cpu_name
from tests.support.docs_blocks import DOCS, filled

ITEMS = (
    Item("start without set_device", on_ranks.started, 40),
    Item("grouped matmul", on_one.grouped_matmul, 20),
    Item("waits of the host", on_one.waits, 20),
    Item("CUDA graph of decoding", on_one.cuda_graph, 20),
    Item("compiled scores", on_one.compiled_scores, 60),
    Item("exchanges with empty ranks", on_ranks.exchanges, 40),
    Item("deterministic mode", on_one.deterministic, 20),
    Item("FSDP2 with ep", on_ranks.fsdp, 60),
    Item("training example", on_ranks.training, 60),
    Item("beside peers", on_one.beside_peers, 40),
)


def devices(device: str) -> str:
    """The names of the devices, asked in a process of its own."""
    count = torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability()
    name = f"{count} x {torch.cuda.get_device_name()} (capability {major}.{minor})"
    return f"{name}, CUDA {torch.version.cuda}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only items whose name contains this")
    parser.add_argument("--write", action="store_true", help="put the table in docs/gpus.md")
    args = parser.parse_args()
    # Asked without starting CUDA, which a forked process could then not use.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic mode requires it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    chosen = [item for item in ITEMS if args.only in item.name]
    if not chosen:
        parser.error(f"no item has {args.only!r} in its name")
    if args.write and len(chosen) < len(ITEMS):
        parser.error("the table of the docs has all items: use --write without --only")
    name = cpu_name() if device == "cpu" else run_item(Item("", devices, 30), device).text
    rows = run_items(chosen, device)
    machine = f"{date.today()}, {name}, torch {torch.__version__}"
    text = table(rows, f"Measured on {machine}, by `python -m tests.bench.gpu`.")
    print(f"\n{text}")
    if args.write:
        page = DOCS / "gpus.md"
        page.write_text(filled(page.read_text(), "gpu", text))


if __name__ == "__main__":
    main()
