"""Port a Mixture-of-Experts block to types, and see the three bugs that mypy finds on the way.

    python examples/03_porting.py                   # the walk: before, typed, fixed
    python examples/03_porting.py --keep my_folder  # and leave the three files there, to play with

The block is written as such blocks often are. To port it is to say where the tensors are that come
in, go out and are kept. mypy, with the plugin of this package, then finds the gate that
is used as it is stored, the shared expert that is added to parts of a sum, and counts that are not
summed over all axes. Nothing of torch is run for that, and no process group is made.

It needs mypy: pip install 'spmd-moe[mypy]'
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

BEFORE = """\
import torch.nn.functional as F
from torch import Tensor, nn

from spmd_moe import DP, TP, MoEMesh, P, R, S, redistribute


class Block(nn.Module):
    gate_ED: nn.Parameter

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.dp, self.tp = mesh[DP], mesh[TP]

    def scores(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.gate_ED).softmax(1)

    def combine(self, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        out_TD = routed_TD + shared_TD
        return redistribute(out_TD, self.tp, src=P, dst=S(0))

    def load(self, counts_E: Tensor) -> Tensor:
        sum_E = redistribute(counts_E, self.dp, src=P, dst=R)
        return sum_E / sum_E.sum()
"""

Changes = list[tuple[str, str]]

ANNOTATE: Changes = [
    (
        "import DP, TP, MoEMesh, P, R, S, redistribute",
        "import DP, TP, I, MoEMesh, P, Placed, R, S, V, redistribute",
    ),
    (
        "\n\nclass Block",
        """
Tokens = Placed[Tensor, DP[V], TP[V]]  # every rank has its own
Whole = Placed[Tensor, DP[V], TP[R]]  # all ranks of tp have the same
Parts = Placed[Tensor, DP[V], TP[P]]  # to be added up over tp
Counts = Placed[Tensor, DP[P], TP[P]]  # to be added up over all ranks


class Block""",
    ),
    ("gate_ED: nn.Parameter", "gate_ED: Placed[nn.Parameter, DP[R], TP[I]]"),
    ("scores(self, x_TD: Tensor) -> Tensor", "scores(self, x_TD: Tokens) -> Tokens"),
    (
        "routed_TD: Tensor, shared_TD: Tensor) -> Tensor",
        "routed_TD: Parts, shared_TD: Whole) -> Tokens",
    ),
    (
        "load(self, counts_E: Tensor) -> Tensor",
        "load(self, counts_E: Counts) -> Placed[Tensor, DP[R], TP[R]]",
    ),
]

REPAIR: Changes = [
    (
        "        return F.linear(x_TD, self.gate_ED)",
        "        gate_ED = redistribute(self.gate_ED, self.tp, src=I, dst=R)\n"
        "        return F.linear(x_TD, gate_ED)",
    ),
    (
        "routed_TD + shared_TD",
        "routed_TD + redistribute(shared_TD, self.tp, src=R, dst=P)",
    ),
    (
        "        return sum_E",
        "        sum_E = redistribute(sum_E, self.tp, src=P, dst=R)\n        return sum_E",
    ),
]

# What each would have done in training; none of them crashes, and the loss looks normal.
OTHERWISE = {
    "scores": "each rank's gate learns from its own tokens alone, and the gates drift apart",
    "combine": "the sum over tp counts the shared expert once for every rank",
    "load": "every rank of tp balances the experts by different counts",
}


def main() -> None:
    args = arguments()
    sources = versions()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        said = checked(args.keep, sources, args.cache_dir)
    else:
        with tempfile.TemporaryDirectory() as folder:
            said = checked(Path(folder), sources, args.cache_dir)
    print("\n".join(walk(sources, said)))


def versions() -> dict[str, str]:
    """The three files, by name."""
    typed = changed(BEFORE, ANNOTATE)
    return {"before": BEFORE, "typed": typed, "fixed": changed(typed, REPAIR)}


def changed(text: str, changes: Changes) -> str:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


# --- mypy, once over all three ----------------------------------------------------------------

# Parts of torch that the files do not use, and that mypy would read for most of its time.
UNUSED = ("_dynamo", "_export", "_functorch", "_inductor", "_refs", "ao", "fx", "onnx", "package")
CONFIG = "[mypy]\nplugins = spmd_moe.mypy_plugin\nfollow_imports = silent\n"
CONFIG += f"[mypy-{','.join(f'torch.{name}.*' for name in UNUSED)}]\nfollow_imports = skip\n"


def checked(folder: Path, sources: dict[str, str], cache: Path) -> str:
    """What mypy says of the sources, written to files of a folder."""
    from mypy import api

    config, files = folder / "mypy.ini", [folder / f"{name}.py" for name in sources]
    config.write_text(CONFIG)
    for file, source in zip(files, sources.values(), strict=True):
        file.write_text(source)
    if not cache.exists():
        print("mypy reads torch first, which may take a minute; then it is cached", file=sys.stderr)
    words = ["--config-file", config, "--cache-dir", cache, "--no-pretty", "--no-error-summary"]
    said, trouble, _ = api.run([str(word) for word in [*words, *files]])
    if trouble:
        sys.exit(trouble)
    return said


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the three files there")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path(".mypy_cache/porting"), help="of mypy (%(default)s)"
    )
    args = parser.parse_args()
    if find_spec("mypy") is None:
        parser.exit(
            1, "this example needs mypy: pip install 'spmd-moe[mypy]', or: pip install mypy\n"
        )
    return args


# --- what is shown ----------------------------------------------------------------------------


def walk(sources: dict[str, str], said: str) -> list[str]:
    before, typed, fixed = sources.values()
    found = {name: reports(name, said) for name in sources}
    bugs = [line for report in found["typed"] for line in shown(*report, typed.splitlines())]
    return [
        f"before.py: no placements. mypy reports {len(found['before'])} errors: it knows nothing.",
        "",
        *difference("", before),
        "",
        "typed.py: what comes in, goes out and is kept has a placement. mypy reports "
        f"{len(found['typed'])} bugs.",
        "",
        *difference(before, typed),
        *bugs,
        "",
        "fixed.py: a move for each, as mypy proposed or as its reason says. mypy reports "
        f"{len(found['fixed'])} errors.",
        "",
        *difference(typed, fixed),
    ]


def reports(name: str, said: str) -> list[tuple[int, list[str]]]:
    """Of one file: the line of every error, and its message with the notes below."""
    found: list[tuple[int, list[str]]] = []
    for line, kind, text in re.findall(rf"(?:^|[/\\]){name}\.py:(\d+): (\w+): (.*)", said, re.M):
        if kind == "error":
            found.append((int(line), [text]))
        elif found:
            found[-1][1].append(text)
    return found


def shown(line: int, message: list[str], source: list[str]) -> list[str]:
    """An error below the code that it is about, and what comes of it."""
    function = next(s for s in reversed(source[:line]) if s.startswith("    def "))
    would = OTHERWISE.get(function.split()[1].partition("(")[0], "")
    code = f"typed.py:{line:<4}{source[line - 1].strip()}"
    return ["", f"  {code}", *(f"    {text}" for text in message), f"    otherwise: {would}"]


def difference(old: str, new: str) -> list[str]:
    """New lines after a plus, those that they replace after a minus; all of them if all are new."""
    if not old:
        return [f"    {line}".rstrip() for line in new.splitlines()]
    lines = difflib.ndiff(old.splitlines(), new.splitlines())
    return [f"  {line}" for line in lines if line[0] in "+-" and line[2:].strip()]


if __name__ == "__main__":
    main()
