"""Pictures of a run of examples/train.py: the loss, and who used which expert, over the steps.

    python examples/train_picture.py runs/001

With matplotlib (the extra `plot`) it writes picture.png; without, it draws with letters, on the
terminal and into picture.txt.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

COLUMNS, ROWS = 72, 12
SHADES = " .:-=+*#%@"


def draw(folder: Path) -> list[Path]:
    """Write the picture of a run, from its metrics; the paths of what was written."""
    file = folder / "metrics.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not steps:
        return []
    if find_spec("matplotlib"):
        return [file, _plotted(steps, folder / "picture.png")]
    path, text = folder / "picture.txt", in_letters(steps)
    path.write_text(text)
    print(text, flush=True)
    return [file, path]


def shares(step: dict[str, Any]) -> list[list[float]]:
    """For each layer and expert, how many times the mean it was used."""
    return [[n * len(counts) / max(1, sum(counts)) for n in counts] for counts in step["counts"]]


# --- with letters -----------------------------------------------------------------------------


def in_letters(steps: list[dict[str, Any]]) -> str:
    """Each column is the mean over some steps."""
    width = min(COLUMNS, len(steps))
    edges = [len(steps) * i // width for i in range(width + 1)]
    parts = [steps[a:b] for a, b in pairwise(edges)]
    losses = [sum(s["loss"] for s in part) / len(part) for part in parts]
    lines = [f"loss, steps {steps[0]['step']} to {steps[-1]['step']}", *_curve(losses), ""]
    lines.append(f"use of each expert, from '{SHADES[0]}' never to '{SHADES[-1]}' twice the mean")
    for layer, experts in enumerate(shares(steps[0])):
        for expert in range(len(experts)):
            means = [sum(shares(s)[layer][expert] for s in part) / len(part) for part in parts]
            cells = "".join(SHADES[min(9, round(4.5 * mean))] for mean in means)
            lines.append(f"{f'layer {layer}' if expert == 0 else '':>8} {expert:>3} |{cells}|")
    return "\n".join(lines) + "\n"


def _curve(losses: list[float]) -> list[str]:
    """One point for each column, between the highest loss and the lowest."""
    high, low = max(losses), min(losses)
    place = [round((high - loss) / ((high - low) or 1.0) * (ROWS - 1)) for loss in losses]
    rows = ["".join("*" if at == row else " " for at in place) for row in range(ROWS)]
    marks = [f"{high - (high - low) * row / (ROWS - 1):>12.3f}" for row in range(ROWS)]
    return [f"{mark} |{cells.rstrip()}" for mark, cells in zip(marks, rows, strict=True)]


# --- with matplotlib --------------------------------------------------------------------------


def _plotted(steps: list[dict[str, Any]], path: Path) -> Path:
    import_module("matplotlib").use("Agg")  # no window
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 8), sharex=True, layout="constrained"
    )
    numbers = [step["step"] for step in steps]
    above.plot(numbers, [step["loss"] for step in steps], marker="" if steps[1:] else "o")
    above.set_ylabel("loss per byte (nats)")
    use = [[use for layer in shares(step) for use in layer] for step in steps]
    layers, experts = len(steps[0]["counts"]), len(steps[0]["counts"][0])
    image = below.imshow(
        list(zip(*use, strict=True)),
        aspect="auto",
        interpolation="nearest",
        extent=(numbers[0] - 0.5, numbers[-1] + 0.5, layers * experts - 0.5, -0.5),
        vmin=0.0,
        vmax=2.0,
    )
    for layer in range(1, layers):
        below.axhline(layer * experts - 0.5, color="white")
    below.set_yticks([(layer + 0.5) * experts - 0.5 for layer in range(layers)])
    below.set_yticklabels([f"layer {layer}" for layer in range(layers)])
    below.set_xlabel("step")
    below.set_ylabel("experts of each layer")
    figure.colorbar(image, ax=below, extend="max", label="use, in times the mean")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="of the run; default: the newest in runs/")
    given = parser.parse_args().folder
    numbered = sorted(Path("runs").glob("[0-9][0-9][0-9]"))
    folder = Path(given) if given else (numbered[-1] if numbered else Path("runs"))
    written = draw(folder)
    print("\n".join(map(str, written)) or f"there are no metrics of a run in {str(folder)!r} yet")


if __name__ == "__main__":
    main()
