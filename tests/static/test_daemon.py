"""mypy's daemon with the plugin: after each edit it says what plain mypy says of the files."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.static.fuzz_daemon import differences
from tests.support.edited_project import Files, Project, Step

HEAD = """
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from spmd_moe import DP, TP, P, Placed, R, Role, V
"""
A = f"""{HEAD}
NORTH = Role("north")
Rows = Placed[Tensor, TP[R]]
def f(x: Tensor) -> Rows: raise NotImplementedError
def plain(x: Tensor) -> Tensor: raise NotImplementedError
@dataclass
class Record:
    x: Rows
def make() -> Record: raise NotImplementedError
class Layer(nn.Module):
    def forward(self, x: Rows) -> Rows: raise NotImplementedError
"""
B = f"""{HEAD}
import a
from a import Rows, f
def add(x: Tensor, r: Placed[Tensor, TP[R]]) -> Tensor:
    return f(x) + r
def call(layer: a.Layer, r: Placed[Tensor, TP[R]]) -> Placed[Tensor, TP[R]]:
    return layer(r)
def role(x: Placed[Tensor, a.NORTH[R]]) -> Placed[Tensor, a.NORTH[R]]:
    return x
def field() -> Tensor:
    return a.make().x.exp()
def own(r: Rows) -> Tensor:
    return r.exp()
def wrong(p: Placed[Tensor, TP[P]]) -> int:
    return p.exp()
def early(r: Rows) -> None:
    _ = Later(r).kept.exp()
class Later:
    def __init__(self, x: Rows) -> None:
        self.kept = f(x) + x
def merge(p: Placed[Tensor, TP[P]], r: Placed[Tensor, TP[P]], c: bool) -> Tensor:
    return p if c else r
"""
C = f"""{HEAD}
from a import f, Rows
def strict(x: Placed[Tensor, TP[R]]) -> Rows:
    return f(x)
def allowed(x: Placed[Tensor, TP[P]]) -> Rows:
    return f(x.exp())  # spmd: allow operation - a test
"""
D = """
import torch
from torch import Tensor
import a
def unplaced(x: Tensor) -> Tensor:
    return a.plain(x).exp()
"""
E = """
import torch
import a
def use() -> None:
    a.make()
    torch.distributed.all_reduce(torch.cat([]))
"""
START: Files = {"a": A, "b": B, "c": C, "d": D, "e": E, "z": A}
UNKNOWN = {"e:6 placement-bypass", "e:6 placement-unknown"}
ALWAYS = {"b:20 placement-operation", "b:20 return-value"} | UNKNOWN
REPORTED = re.compile(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$")


def change(name: str, *pairs: tuple[str, str]) -> Files:
    text = START[name] or ""
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return {name: text}


# Edits of the start, and the errors that they bring beside, or instead of, those that there always
# are: module, line, code.
CASES: dict[str, tuple[Files, set[str]]] = {
    "an error comes into the file": (
        change("b", ("(r: Rows)", "(r: Placed[Tensor, TP[P]])")),
        ALWAYS | {"b:18 placement-operation", "b:22 placement-argument"},
    ),
    "the error that there was goes": (
        change("b", ("wrong(p: Placed[Tensor, TP[P]])", "wrong(p: Rows)")),
        {"b:20 return-value"} | UNKNOWN,
    ),
    "a type that mypy finds out late": (
        change("b", ("(self, x: Rows)", "(self, x: Placed[Tensor, TP[P]])")),
        ALWAYS | {"b:22 placement-argument", "b:25 placement-operation"},
    ),
    "branches": (
        change("b", ("r: Placed[Tensor, TP[P]], c: bool", "r: Rows, c: bool")),
        ALWAYS | {"b:27 placement-branch"},
    ),
    "an alias in another file": (
        change("a", ("Rows = Placed[Tensor, TP[R]]", "Rows = Placed[Tensor, TP[P]]")),
        ALWAYS
        | {"b:10 placement-operation", "b:12 placement-argument", "b:12 placement-return"}
        | {"b:16 placement-operation", "b:18 placement-operation", "b:22 placement-operation"},
    ),
    "a function in another file": (
        change("a", ("f(x: Tensor) -> Rows", "f(x: Tensor) -> Placed[Tensor, TP[P]]")),
        ALWAYS
        | {"b:10 placement-operation", "b:25 placement-operation"}
        | {"c:9 placement-return", "c:11 placement-return"},
    ),
    "a function that is not placed any more": (
        change("a", ("f(x: Tensor) -> Rows", "f(x: Tensor) -> Tensor")),
        ALWAYS | {"c:9 placement-unknown", "c:11 placement-unknown"},
    ),
    "the first placement of a file, found in one function": (
        change("a", ("plain(x: Tensor) -> Tensor", "plain(x: Tensor) -> Placed[Tensor, TP[P]]")),
        ALWAYS | {"d:6 placement-operation"},
    ),
    "the forward of a module in another file": (
        change("a", ("(self, x: Rows) -> Rows", "(self, x: Placed[Tensor, TP[P]]) -> Rows")),
        ALWAYS | {"b:12 placement-argument"},
    ),
    "a field of a record in another file": (
        change("a", ("    x: Rows", "    x: Placed[Tensor, TP[P]]")),
        ALWAYS | {"b:16 placement-operation"},
    ),
    "a record that is not placed any more": (
        change("a", ("    x: Rows", "    x: Tensor")),
        ALWAYS - UNKNOWN,
    ),
    "a role in another file": (
        change("a", ('NORTH = Role("north")', "NORTH = 0")),
        ALWAYS | {"b:13 placement-annotation"},
    ),
    "a comment that allows": (
        change("c", (" - a test", "")),
        ALWAYS | {"c:11 placement-operation", "c:11 placement-allow"},
    ),
    "a comment that has nothing to allow": (
        change("c", ("[Tensor, TP[P]]", "[Tensor, TP[R]]")),
        ALWAYS | {"c:11 placement-allow"},
    ),
    "two files, of which one uses the other": (
        change("b", ("f(x) + r", "f(x) + f(x)"), ("from a import Rows, f", "from a import *"))
        | change("a", ("f(x: Tensor) -> Rows", "f(x: Tensor) -> Placed[Tensor, TP[P]]")),
        ALWAYS | {"b:25 placement-operation", "c:9 placement-return", "c:11 placement-return"},
    ),
    "two files, in the other order": (
        change("b", ("from a import Rows, f", "from a import Rows; from z import f"))
        | change("z", ("f(x: Tensor) -> Rows", "f(x: Tensor) -> Placed[Tensor, TP[P]]")),
        ALWAYS | {"b:10 placement-operation", "b:25 placement-operation"},
    ),
    "a mistake of another kind": (
        change("b", ("f(x) + r", "f(x) + nothing")),
        ALWAYS | {"b:10 name-defined", "b:10 no-any-return"},
    ),
    "a file that cannot be parsed": (change("d", ("unplaced(", "(")), {"d:5 syntax"}),
    "a file from which names go": (
        change("a", ("def make() -> Record: raise NotImplementedError", "")),
        ALWAYS - UNKNOWN | {"b:16 attr-defined", "b:16 no-any-return", "e:5 attr-defined"},
    ),
}


@dataclass
class Edited:
    """The step after an edit, what plain mypy says then, and the step after it is taken back."""

    step: Step
    plain: list[str]
    back: Step


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Edited]:
    project = Project(tmp_path_factory.mktemp("edited"))
    project.edit(**START)
    steps = {}
    for name, (files, _) in CASES.items():
        project.edit(**files)
        project.edit(**{name: START[name] for name in files})
        steps[name] = project.steps[-2:]
    found = {name: Edited(step, project.plain(step), back) for name, (step, back) in steps.items()}
    found[""] = Edited(project.steps[0], project.plain(project.steps[0]), project.steps[0])
    return found


def errors(said: list[str]) -> set[str]:
    matches = (REPORTED.search(line) for line in said)
    return {f"{m[1]}:{m[2]} {m[3]}" for m in matches if m is not None}


@pytest.mark.slow
def test_what_there_is_at_the_start(edited: dict[str, Edited]) -> None:
    assert edited[""].step.said == edited[""].plain
    assert errors(edited[""].plain) == ALWAYS


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_after_an_edit_the_daemon_says_what_plain_mypy_says(
    edited: dict[str, Edited], case: str
) -> None:
    assert edited[case].step.said == edited[case].plain
    assert errors(edited[case].plain) == CASES[case][1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_after_the_edit_is_taken_back_it_says_what_it_said_before(
    edited: dict[str, Edited], case: str
) -> None:
    assert edited[case].back.said == edited[""].plain


MERGING = f"""{HEAD}
def merge(p: Placed[Tensor, TP[P]], r: Placed[Tensor, TP[R]], c: bool) -> int:
    return p if c else r  # spmd: allow branch - a test
def again(p: Placed[Tensor, TP[P]], r: Placed[Tensor, TP[R]]) -> None:
    merge(p, r, True)
"""


@pytest.mark.slow
def test_two_files_that_mypy_erases_notes_in_do_not_set_each_other_off(tmp_path: Path) -> None:
    """What is erased is a change to the daemon. It would go from one to the other without end."""

    def out_of_time(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(60)
    try:
        project = Project(tmp_path)
        said = project.edit(a=MERGING, b=MERGING)
        assert errors(said) == {"a:8 return-value", "b:8 return-value"}
        assert project.edit(a=MERGING + "\n") == said
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_random_edits(tmp_path: Path) -> None:
    """One seed of `python -m tests.static.fuzz_daemon`, which runs many."""
    assert differences(tmp_path, seed=1, edits=12) == []
