"""What mypy with our plugin says of the bugs: one run over all changed sources, and the right ones.

A bug is found where its source has an error of ours that the right source has not. What is no
change of a source stands in typecheck/fail/bugs.py as code, in a function of its number, if typed
code can have that mistake at all; there another test expects each marked line.
"""

from __future__ import annotations

import ast
import functools
import re
import tempfile
from collections import Counter
from pathlib import Path

from tests.catalogue.bug import Bug, Fact
from tests.catalogue.code import ROOT, changed_source, source_of
from tests.static.test_typecheck import marked, mypy

CASES = ROOT / "typecheck" / "fail" / "bugs.py"
ERROR = re.compile(r"^.*?(\w+)\.py:\d+: error: (.*)  \[placement-(\w+)\]$", re.M)

LOST = ("unknown", "allow")  # these say that it cannot follow, not that something is wrong

# Why the static check does not see a bug; those that it sees are not here.
VALUES = "kinds are right: values are not"
NUMBERS = "a number has no kind"
SIZES = "sizes are in no type"
DIMS = "which dim is cut, is not followed through a reshape"
DATA = "which axes or kinds, is data"
BELIEVED = "what is declared is believed"
MESHES = "the two meshes meet, between which little carries over"
DTENSORS = "DTensors have placements of their own"
TIMES = "when code runs is in no type"
NAMES = "names are in no type"
UNSEEN = {
    "B04b": BELIEVED,
    "B06b": DIMS,
    "B06e": MESHES,
    "B06f": DTENSORS,
    "B13a": DATA,
    "B13b": DATA,
    "B15b": NUMBERS,
    "B15c": NUMBERS,
    "B17a": NUMBERS,
    "B17b": NUMBERS,
    "B18a": SIZES,
    "B20c": NUMBERS,
    "B22a": SIZES,
    "B25a": DIMS,
    "B26a": SIZES,
    "B27a": DATA,
    "B28a": SIZES,
    "B30b": SIZES,
    "B34a": VALUES,
    "B35a": TIMES,
    "B35c": TIMES,
    "B36a": SIZES,
    "B36c": VALUES,
    "B37a": NUMBERS,
    "B39a": DATA,
    "B41a": NAMES,
    "B43a": NUMBERS,
}


@functools.cache
def reports(bugs: tuple[Bug, ...]) -> dict[str, tuple[str, ...]]:
    """The codes of what is reported of each bug alone, in the order of the lines."""
    sources = {module: source_of(module) for bug in bugs for module in modules(bug)}
    files = {_file("right", module): text for module, text in sources.items()}
    for bug in bugs:
        for module in modules(bug):
            edits = [edit for edit in bug.edits if edit.module == module]
            files[_file(bug.id, module)] = changed_source(module, edits)
    found = _errors(files)
    codes = {}
    for bug in bugs:
        new: list[str] = []
        for module in modules(bug):
            right = Counter(found.get(_file("right", module), ()))
            wrong = found.get(_file(bug.id, module), [])
            new += [code for _, code in Counter(wrong) - right if code not in LOST]
        codes[bug.id] = tuple(dict.fromkeys(new))
    return codes


def modules(bug: Bug) -> list[str]:
    return list(dict.fromkeys(edit.module for edit in bug.edits))


def _file(name: str, module: str) -> str:
    return f"mutant_{name}_{module.replace('.', '_')}"


def _errors(files: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Message and code of each error of ours, by file; all of them are strict."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in files.items():
            (folder / f"{file}.py").write_text(text)
        config = folder / "pyproject.toml"
        settings = (ROOT / "pyproject.toml").read_text()
        config.write_text(settings.replace("\nstrict = [", '\nstrict = ["mutant_*",', 1))
        said = mypy("--config-file", config, *sorted(folder.glob("*.py")))
    found: dict[str, list[tuple[str, str]]] = {}
    for file, message, code in ERROR.findall(said):
        found.setdefault(file, []).append((message, code))
    return found


@functools.cache
def cases() -> dict[str, tuple[str, ...]]:
    """The codes that are marked in the functions of typecheck/fail/bugs.py, by their names."""
    found = {}
    marks = sorted(marked(CASES))
    for node in ast.parse(CASES.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno is not None:
            lines = range(node.lineno, node.end_lineno + 1)
            codes = [code for _, line, code in marks if line in lines]
            found[node.name.upper()] = tuple(c.removeprefix("placement-") for c in codes)
    return found


def verdict(bug: Bug | Fact, bugs: tuple[Bug, ...]) -> str:
    """The codes with which it is reported; empty where it is not seen."""
    found = reports(bugs)[bug.id] if isinstance(bug, Bug) else ()
    typed = () if found else cases().get(bug.id.upper(), ())
    return ", ".join(found) or (f"typed: {', '.join(typed)}" if typed else "")
