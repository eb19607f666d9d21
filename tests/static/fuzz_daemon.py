"""Random edits of three small modules: does mypy's daemon say what plain mypy says?

    python -m tests.static.fuzz_daemon --seeds 20

Each module is put together from fragments, each of which is there in one of several versions. An
edit takes other versions of some; some edits leave a module that cannot be parsed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.support.edited_project import Files, Project

HEAD = """
from dataclasses import dataclass
from typing import NamedTuple, TypeVar
import torch
from torch import Tensor, nn
from spmd_moe import DP, TP, EP, P, Placed, R, Role, S, V, I, MoEMesh, redistribute
"""
TYPES = ("Tensor", "Placed[Tensor, TP[R]]", "Placed[Tensor, TP[P]]", "Placed[Tensor, TP[S[0]]]")

# Of each fragment one version; a $ is replaced by one of the types above.
FRAGMENTS: dict[str, list[list[str]]] = {
    "a": [
        ["NORTH = Role('north')", "NORTH = Role('south')", "NORTH = TP", ""],
        ["Rows = $", "Rows = $", "Rows = Placed[Tensor, NORTH[V]]"],
        ["def f(x: Tensor) -> $: raise NotImplementedError", "def f(x: $) -> Rows: return x"],
        [
            "@dataclass\nclass Rec:\n    x: $\n    y: Rows",
            "class Rec(NamedTuple):\n    x: $\n    y: $",
        ],
        ["def make() -> Rec: raise NotImplementedError", "def make() -> Rec | None: return None"],
        ["class Layer(nn.Module):\n    def forward(self, x: $) -> $: raise NotImplementedError"],
        ["class Base:\n    w: $\n    def m(self, x: $) -> $: raise NotImplementedError"],
        ["T = TypeVar('T', bound=Tensor)\ndef same(x: T) -> T: return x"],
        ["W = f(torch.cat([]))", "W: $ = f(torch.cat([]))", ""],
        ["def wrong() -> int: return ''", "def unknown() -> int: return nothing", "", ""],
        ["from b import late as early", "", "", ""],
    ],
    "b": [
        ["from a import *", "import a\nfrom a import f, Rec, make, Layer, Base, same, Rows"],
        ["import a\nEAST = a.NORTH", "EAST = TP", ""],
        ["h = f", "def h(x: $) -> $: return f(x)", "def h(x: Rows) -> Rows: return x"],
        ["def use(p: $, r: $) -> Tensor:\n    y = f(p)\n    return y + r"],
        [
            "def merge(p: $, r: $, c: bool) -> int:\n    return p if c else r",
            "def merge(p: $, r: $, c: bool) -> $:\n    return p if c else r",
        ],
        ["def again(p: $, r: $) -> None: merge(p, r, True)", ""],
        ["def fields(m: Rec) -> Tensor:\n    return m.x + m.y", ""],
        ["def fresh() -> Tensor:\n    m = make()\n    return m.x.exp() if m else f(torch.cat([]))"],
        ["def call(n: Layer, x: $) -> $:\n    return n(x)", ""],
        ["class Sub(Base):\n    def m(self, x: $) -> $: return x", "class Sub(Base): ..."],
        [
            "class Deep(Layer): ...",
            "class Deep(Layer):\n    def forward(self, x: $) -> $: return x",
        ],
        ["def late(x: $) -> $: return x"],
        ["def bad(s: Sub) -> int:\n    reveal_type(s.w)\n    return s.w", ""],
        [
            "def allowed(p: $) -> Tensor:\n    return p.exp()  # spmd: allow operation - it is so",
            "def allowed(p: $) -> Tensor:\n    return p.exp()  # spmd: allow operation",
            "def allowed(p: $) -> Tensor:\n    return p.exp()",
        ],
        ["def place(x: Placed[Tensor, EAST[V]]) -> Tensor:\n    return x + f(x)", ""],
    ],
    "c": [
        ["import b", "import b\nfrom b import h, Sub, Deep"],
        [
            "import a\ndef far(x: Placed[Tensor, a.NORTH[V]]) -> Rows: return x",
            "from a import Rows",
        ],
        ["def g(x: $) -> $:\n    return b.h(x) * b.h(x)"],
        ["def attr(s: b.Sub) -> $:\n    return s.w + s.m(s.w)", ""],
        ["def deep(n: b.Deep, x: $) -> $:\n    y = n(x)\n    return y", ""],
        ["def sent(x: $) -> None:\n    torch.distributed.all_reduce(x)", ""],
        [
            "def moved(x: $, m: MoEMesh) -> $:\n"
            "    return redistribute(x, m[b.EAST], src=P, dst=R)",
            "",
        ],
        ["def made() -> Tensor:\n    return b.fresh()  # spmd: allow unknown - tests", ""],
        ["class Kept:\n    def __init__(self) -> None:\n        self.v = b.h(b.fresh())", ""],
        ["def held(k: Kept, x: $) -> $:\n    return k.v + x", ""],
        [
            "def loop(x: $, n: int) -> $:\n    for _ in range(n):\n"
            "        x = x + b.late(x)\n    return x"
        ],
        ["def merge(p: $, r: $, c: bool) -> int:\n    return p if c else r", ""],
        ["def again(p: $, r: $) -> None: merge(p, r, True)", ""],
        ["raise SystemExit", "", "", ""],
    ],
}


class Author:
    """Someone who edits, with a seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.broken = random.Random(seed), ""
        self.modules = {name: [self._version(f) for f in FRAGMENTS[name]] for name in FRAGMENTS}

    def _version(self, versions: list[str]) -> str:
        first, *rest = self.random.choice(versions).split("$")
        return first + "".join(self.random.choice(TYPES) + part for part in rest)

    def start(self) -> Files:
        return {name: self._text(name) for name in self.modules}

    def edit(self) -> Files:
        """The modules that an edit changes, with what is in them afterwards."""
        chance = self.random
        names = chance.sample(sorted(self.modules), chance.choice((1, 1, 1, 2)))
        for name in names:
            for at in chance.sample(range(len(self.modules[name])), chance.choice((1, 1, 2))):
                self.modules[name][at] = self._version(FRAGMENTS[name][at])
        if self.broken not in names and chance.random() < 0.1:
            names = [self.broken or names[0]]  # of two such modules mypy may name either
            self.broken = names[0]
            return {names[0]: "def f(:\n"}
        self.broken = "" if self.broken in names else self.broken
        return {name: self._text(name) for name in names}

    def _text(self, name: str) -> str:
        return "\n".join([HEAD, *self.modules[name], ""])


def run(folder: Path, seed: int, edits: int, *, plugin: bool) -> dict[int, list[str]]:
    """One author's edits: by step, what the daemon and plain mypy do not agree on."""
    folder.mkdir()
    project, author = Project(folder, plugin), Author(seed)
    project.edit(**author.start())
    for _ in range(edits):
        project.edit(**author.edit())
    found = {}
    for number, step in enumerate(project.steps):
        plain = project.plain(step)
        if step.said != plain:
            found[number] = [f"daemon: {line}" for line in step.said if line not in plain]
            found[number] += [f"plain:  {line}" for line in plain if line not in step.said]
    return found


def differences(folder: Path, seed: int, edits: int) -> list[str]:
    """Differences, except for steps on which mypy without the plugin differs too."""
    found = run(folder / "with", seed, edits, plugin=True)
    own = run(folder / "without", seed, edits, plugin=False) if found else {}
    return [
        f"seed {seed}, step {n}, {line}" for n in found if n not in own for line in found[n]
    ] + [f"seed {seed}, step {n}: mypy's own" for n in found if n in own]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--edits", type=int, default=12)
    given = options.parse_args()
    bad = 0
    for seed in range(given.first, given.first + given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found = differences(Path(folder), seed, given.edits)
        print("\n".join(found) or f"seed {seed}: the same", flush=True)
        bad += any("own" not in line for line in found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
