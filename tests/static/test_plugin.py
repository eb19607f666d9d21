"""The plugin as a guest in mypy: never in the way, never stale, and quick."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spmd_moe.static.end_of_module import HOOK
from spmd_moe.static.error_codes import STATIC_RULES, codes_table
from spmd_moe.static.problems_found import RAISE
from spmd_moe.static.settings import (
    Config,
    ignored_list,
    read_config,
    settings_file,
    wrong_setting,
)
from tests.static.test_typecheck import ROOT, mypy
from tests.support import small_mypy_world
from tests.support.mypy_lock import mypy_alone

PYPROJECT = ROOT / "pyproject.toml"
WRONG = """
from torch import Tensor
from spmd_moe import TP, P, Placed, R

def f(p: Placed[Tensor, TP[P]], r: Placed[Tensor, TP[R]]) -> None:
    _ = p + r
"""


def run(folder: Path, *words: str, package: Path = ROOT, raising: bool = True) -> str:
    """mypy in a process of its own, with the plugin of `package`."""
    environment = {**os.environ, "PYTHONPATH": str(package), RAISE: "1" if raising else ""}
    command = [sys.executable, "-m", "mypy", "--no-pretty", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


ODD = [
    "Placed",
    "Placed[Tensor]",
    "Placed[()]",
    "Placed[Tensor, ()]",
    "Placed[Tensor, TP[()]]",
    "Placed[Tensor, TP[V][V]]",
    "Placed[Tensor, TP[S[0][1]]]",
    "Placed[Tensor, TP[S[-0]]]",
    "Placed[Tensor, TP[S['a']]]",
    "Placed[Tensor, TP[S[1.5]]]",
    "Placed[Tensor, TP[S[True]]]",
    "Placed[Tensor, *TP]",
    "Placed[Tensor, TP | DP]",
    "Placed[[Tensor], TP[V]]",
    "Placed[Placed[Tensor, TP[V]], DP[R]]",
    "Placed[Tensor | None | int, TP[V]]",
    "Placed['Tensor', TP['V']]",
    "Placed[Tensor, lambda: 0]",
    "Placed[Tensor, TP[V] if TP else DP[V]]",
    "Placed[Tensor, TP(V)]",
    "Placed[Tensor, None]",
    "Placed[None, TP[V]]",
    "Placed[type[Tensor], TP[V]]",
    "Placed[list[Tensor], TP[V]]",
    "Placed[tuple[Tensor, ...], TP[V]]",
    "Placed[T, TP[V]]",
    "Placed[Unheard, TP[V]]",
    "Placed[Tensor, Unheard[V]]",
    "Placed[Tensor, TP[Unheard]]",
    "Placed[Tensor, ...]",
    "list[Placed]",
    "Placed[Tensor, typing.TP[V]]",
]


@pytest.mark.slow
def test_odd_annotations_break_nothing(tmp_path: Path) -> None:
    """Each in a signature, an alias and a class, followed by code that uses it."""
    head = "import typing\nimport torch\nfrom torch import Tensor\n"
    head += "from spmd_moe import DP, TP, P, Placed, R, S, V\nT = typing.TypeVar('T')\n"
    for number, odd in enumerate(ODD):
        text = f"{head}def f(x: {odd}, *y: {odd}) -> {odd}:\n    z = x\n    return z + x @ x.T[0]\n"
        text += f"A = {odd}\nclass C:\n    a: {odd}\n    def g(self, b: A) -> A:\n"
        text += "        self.a = torch.cat([b, self.a]); return f(b, self.a) if b else self.a\n"
        (tmp_path / f"odd_{number}.py").write_text(text)
    said = mypy("--config-file", PYPROJECT, *tmp_path.glob("*.py"))
    reported = set(re.findall(r"odd_(\d+)\.py:\d+: error", said))
    fine = {str(ODD.index(odd)) for odd in ("Placed[Tensor]", "Placed[Tensor, TP[S[-0]]]")}
    assert reported >= {str(n) for n in range(len(ODD))} - fine - UNREPORTED


# A placement within another adds to it, as Annotated does.
UNREPORTED = {str(ODD.index("Placed[Placed[Tensor, TP[V]], DP[R]]"))}


@pytest.mark.long
def test_files_without_placements_are_left_alone(tmp_path: Path) -> None:
    """spmd_types and some of torch, which hooks do reach: not one line of ours."""
    packages = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    files = [*(packages / "spmd_types").glob("*.py"), *(packages / "torch/nn/modules").glob("*.py")]
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nplugins = spmd_moe.mypy_plugin\ncheck_untyped_defs = True\n")
    copied = [shutil.copy(f, tmp_path / f"copy_{n}.py") for n, f in enumerate(files)]
    assert len(copied) > 50
    said = mypy("--config-file", config, "--follow-imports=silent", *copied)
    assert "[placement" not in said


# What mypy's own plugin answers for, and a class that another plugin may answer for.
EVERYDAY = """
import ctypes
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial, singledispatch
from typing import Any, TypedDict

class Movie(TypedDict, total=False):
    year: int

class Color(Enum):
    RED = 1

@dataclass
class Point:
    x: int
    y: int = 0

class Adder:
    def __call__(self, a: int) -> int: return a

@singledispatch
def size(a: object) -> int: raise TypeError

@size.register(int)
def _(a: int) -> int: return a

def use(movie: Movie, color: Color, array: ctypes.Array[ctypes.c_int]) -> None:
    reveal_type(movie.get("year", ""))
    reveal_type(movie.setdefault("year", 1))
    reveal_type(movie.pop("year", None))
    movie.update({"year": "none"})
    del movie["era"]
    reveal_type(color.name)
    reveal_type(Color.RED.value)
    reveal_type(array[0])
    reveal_type(replace(Point(1), y=2))
    replace(Point(1), z=2)
    reveal_type(partial(pow, 2)(3))
    partial(Adder().__call__, "a")
    reveal_type((2**3, 2**-3, (1, "") * 2, len("")))
    reveal_type(Adder()(1))
    size(1, 2)
"""
# It answers for no name, and writes down which names it was asked for.
RECORDER = """
from mypy.plugin import Plugin

def recorded(hook):
    def ask(self, fullname):
        with open("asked.txt", "a") as file:
            file.write(f"{hook} {fullname}\\n")
    return ask

HOOKS = [name for name in dir(Plugin) if name.endswith(("_hook", "_hook_2"))]
Recorder = type("Recorder", (Plugin,), {name: recorded(name) for name in HOOKS})

def plugin(version):
    return Recorder
"""


def test_other_plugins_are_asked_for_every_name_that_has_no_placement(tmp_path: Path) -> None:
    """mypy's own among them: who answers first is the only one to be asked."""
    (tmp_path / "everyday.py").write_text(EVERYDAY)
    (tmp_path / "recorder.py").write_text(RECORDER)
    said: list[str] = []
    asked: list[set[str]] = []
    for plugins in ("recorder.py", "spmd_moe.mypy_plugin, recorder.py"):
        (tmp_path / "mypy.ini").write_text(f"[mypy]\nplugins = {plugins}\n")
        said.append(run(tmp_path, "--no-incremental", "everyday.py"))
        names = (tmp_path / "asked.txt").read_text().splitlines()
        asked.append(set(names) - {f"get_method_hook {HOOK}"})
        (tmp_path / "asked.txt").unlink()
    assert said[0] == said[1]
    assert said[0].count("note: Revealed") == 10 and said[0].count("error:") == 5, said[0]
    assert asked[0] == asked[1]
    assert "get_method_signature_hook everyday.Adder.__call__" in asked[0]


def test_an_error_of_the_plugin_is_told_in_tests_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    shutil.copytree(ROOT / "spmd_moe", package / "spmd_moe")
    broken = package / "spmd_moe" / "static" / "expression_hooks.py"
    source = broken.read_text()
    first = "    receiver = ctx.type if isinstance(ctx, MethodContext) else None\n"
    assert first in source
    broken.write_text(source.replace(first, "    raise KeyError('a bug')\n"))
    (tmp_path / "wrong.py").write_text(WRONG)
    words = ("--config-file", str(small_mypy_world.build(tmp_path)), "wrong.py")
    assert "INTERNAL ERROR" in run(tmp_path, *words, package=package)
    assert "Success" in run(tmp_path, *words, package=package, raising=False)


@pytest.mark.slow
def test_an_edited_rule_is_seen_at_once_and_torch_stays_cached(tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(ROOT / "spmd_moe", package / "spmd_moe")
    (tmp_path / "wrong.py").write_text(WRONG)
    words = ("-v", "--config-file", str(small_mypy_world.build(tmp_path)), "wrong.py")
    assert "placement-operation" in run(tmp_path, *words, package=package)
    rules = package / "spmd_moe" / "static" / "operator_rules.py"
    text = rules.read_text()
    rule = 'if tensors == {"P"} and linearity == "linear"'
    assert rule in text
    rules.write_text(text.replace(rule, 'if tensors <= {"P", "R"} and linearity == "linear"'))
    said = run(tmp_path, *words, package=package)
    assert "Success" in said
    stale = set(re.findall(r"Metadata abandoned for ([\w.]+):", said))
    assert "wrong" in stale
    assert not any(name.startswith(("torch", "builtins")) for name in stale)


@pytest.mark.slow
def test_a_warm_run_over_the_package_is_quick() -> None:
    words = ("-m", "mypy", "--config-file", str(PYPROJECT), "spmd_moe")
    with mypy_alone():
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        before = os.times()
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        after = os.times()
    took = after.children_user + after.children_system
    took -= before.children_user + before.children_system
    assert took < 1.5, took


def test_settings_are_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    toml, ini = tmp_path / "pyproject.toml", tmp_path / "mypy.ini"
    toml.write_text('[tool.spmd_moe]\nstrict = ["a.b", "c.*"]\n')
    ini.write_text("[mypy]\n[spmd_moe]\nstrict = a.b,\n    c.*\n")
    for path in (toml, ini):
        config = read_config(str(path))
        assert config == Config(("a.b", "c.*"))
        assert config.is_strict("c.d.e") and config.is_strict("a.b") and not config.is_strict("a")
    for text in ("", "[tool", "[tool.spmd_moe]\nstrict = 3"):
        toml.write_text(text)
        assert read_config(str(toml)) == Config()
    assert read_config(None) == read_config(str(tmp_path / "none.ini")) == Config()
    assert wrong_setting(str(toml)) == "strict = 3 is not a list of modules"
    assert wrong_setting(str(ini)) is wrong_setting(None) is None
    ini.write_text("[mypy]\n[spmd_moe]\nstrct = a\n")
    assert wrong_setting(str(ini)) == "'strct' is no setting; there is 'strict'"


def test_a_list_is_read_where_mypy_has_no_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toml = tmp_path / "pyproject.toml"
    toml.write_text('[tool.spmd_moe]\nstrict = ["a"]\n')
    assert settings_file(None) == str(toml) and settings_file("mypy.ini") == "mypy.ini"
    assert ignored_list(str(tmp_path / "elsewhere" / ".mypy.ini")) is None
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))  # the user's own settings
    assert ignored_list(str(tmp_path / "elsewhere" / ".mypy.ini")) == str(toml)


def test_a_list_of_strict_modules_in_a_file_that_is_not_read_is_an_error(tmp_path: Path) -> None:
    toml, ini = tmp_path / "pyproject.toml", tmp_path / "mypy.ini"
    (tmp_path / "a.py").write_text("x = 1\n")
    ini.write_text("[mypy]\nplugins = spmd_moe.mypy_plugin\n")
    toml.write_text('[tool.mypy]\nstrict = true\n[tool.spmd_moe]\nstrict = ["a"]\n')
    said = mypy("--config-file", ini, tmp_path / "a.py")
    assert f"{toml}: error: its list of strict modules has no effect" in said
    assert f"fix: move the list to [spmd_moe] in {ini.name}" in said
    toml.write_text("[tool.mypy]\nstrict = true\n")
    assert "error" not in mypy("--config-file", ini, tmp_path / "a.py")


def test_the_table_of_codes_is_complete() -> None:
    assert codes_table().count("\n") == len(STATIC_RULES) + 1
