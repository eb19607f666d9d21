"""The layer compared with those of transformers and torchtitan: counts, kernels, time.

python -m tests.bench.peers                # counts and waits: half a minute, on any machine
python -m tests.bench.peers --compile      # and kernels after torch.compile (needs a compiler)
python -m tests.bench.peers --time 6       # and time, 6 seconds for each row
python -m tests.bench.peers --compile --time 6 --write     # the tables of docs/benchmarks.md

torchtitan need not be installed: a directory with it on PYTHONPATH is enough.
"""

from __future__ import annotations

import argparse
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import product

import torch

from tests.bench.layer import cpu_name, short
from tests.bench.peers.layers import FINE, PEERS, WIDE, Layer, Sizes, layers
from tests.bench.peers.measure import counts, kernels, ratios, tokens, waits
from tests.support.docs_blocks import DOCS, filled

TOKENS, DTYPES = (8, 128, 2048), (torch.float32, torch.bfloat16)
NAMES = ("ours", *PEERS)


def count_table() -> list[str]:
    lines = [f"| sizes | tokens | dtype | what | {' | '.join(NAMES)} |", "| --- " * 7 + "|"]
    for sizes, dtype in product((WIDE, FINE), DTYPES):
        found = layers(sizes, dtype, device="meta")[0]
        for number, training in product(TOKENS, (False, True)):
            made = counts(found, tokens(sizes, number, dtype, "meta"), training=training)
            cells = [str(made.get(name, "")) for name in NAMES]
            what = f"{sizes} | {number} | {short(dtype)} | {_kind(training)}"
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def kernel_table() -> list[str]:
    lines = [f"| kernels, D 512, F 1024 | {' | '.join(NAMES)} |", "| --- " * 4 + "|"]
    for training in (False, True):
        x = tokens(WIDE, 8, torch.bfloat16)  # kernels are as many for each number of tokens
        made = {layer.name: _kernels(layer, x, training) for layer in layers(WIDE, x.dtype)[0]}
        cells = [made.get(name, "") for name in NAMES]
        lines.append(f"| {_kind(training)} | {' | '.join(cells)} |")
    return lines


def _kernels(layer: Layer, x: torch.Tensor, training: bool) -> str:
    try:
        return kernels(layer, x, training=training)
    except Exception as error:  # of a peer; the table reports that its graph breaks
        if layer.name == "ours":
            raise
        return f"no whole graph ({type(error).__name__})"


def time_table(seconds: float) -> list[str]:
    peers = list(PEERS)
    lines = [f"| sizes | tokens | dtype | what | {' | '.join(peers)} |", "| --- " * 6 + "|"]
    for sizes, dtype, number, training in product((WIDE, FINE), DTYPES, TOKENS, (False, True)):
        found = layers(sizes, dtype, on_grouped_mm=False)[0]
        made = ratios(found, tokens(sizes, number, dtype), training=training, seconds=seconds)
        cells = [str(made.get(peer, "not measured")) for peer in peers]
        what = f"{sizes} | {number} | {short(dtype)} | {_kind(training)}"
        lines.append(f"| {what} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def _kind(training: bool) -> str:
    return "training" if training else "forward"


def versions() -> str:
    found = []
    for name in ("torch", *PEERS):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="count kernels of Inductor")
    parser.add_argument("--time", type=float, default=0, help="seconds for each row of times")
    parser.add_argument("--write", action="store_true", help="put the tables in the docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    missing = layers(Sizes(16, 16, 4, 2), torch.float32)[1]
    for name, why in missing.items():
        print(f"without {name}: {why}")
    if args.write and missing:
        parser.error("the tables of the docs have all layers")
    reads = ", ".join(f"{name} {number}" for name, number in waits(Sizes(64, 64, 4, 2)).items())
    machine = f"{date.today()}, {cpu_name()}, {versions()}, 1 thread"
    command = "`python -m tests.bench.peers --write`"
    tables = {"peers": [*count_table(), "", f"Waits of the host: {reads}."]}
    if args.compile:
        tables["peers"] += ["", *kernel_table()]
    tables["peers"] += ["", f"Measured on {machine}, by {command}."]
    if args.time:
        tables["peer-times"] = [*time_table(args.time), "", f"Measured on {machine}."]
    print("\n".join(line for lines in tables.values() for line in lines))
    if args.write:
        page = DOCS / "benchmarks.md"
        text = page.read_text()
        for name, lines in tables.items():
            text = filled(text, name, "\n".join(lines))
        page.write_text(text)


if __name__ == "__main__":
    main()
