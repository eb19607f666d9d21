"""The package as it is installed: metadata, files, and what is said when something is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest

import spmd_moe
from tests.support.docs_blocks import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


def test_metadata() -> None:
    project = PROJECT["project"]
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in project["classifiers"]
    assert project["urls"] and project["optional-dependencies"]["mypy"] == ["mypy>=2.4,<3"]
    assert f"## [{spmd_moe.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_source_distribution_has_what_commands_of_the_readme_need() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    needed = ["/.ci", "/spmd_moe", "/tests", "/examples", "/typecheck", "/docs", "/*.md"]
    assert set(needed) <= set(included)
    assert (ROOT / ".ci" / "constraints.txt").exists()


def test_constraints_pin_every_tool_of_the_tests() -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / ".ci" / "constraints.txt").read_text(), re.M)
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=]", line)[0].lower() for line in wanted}
    assert names <= {name.lower() for name in pinned}
    assert {"sphinx", "myst-parser"} <= names  # the tests build the documentation


@pytest.mark.slow
def test_an_old_mypy_is_refused_in_one_line() -> None:
    program = "import mypy.version as v; v.__version__ = '1.19.1'\ntry:\n    {}\n{}"
    caught = "except ImportError as error:\n    print(error)"
    said = run(program.format("import spmd_moe.mypy_plugin", caught))
    assert said == "mypy 2.4 or newer is needed, this is 1.19.1: pip install 'mypy>=2.4,<3'\n"


WITHOUT_NUMPY = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numpy":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
sys.meta_path.insert(0, Missing())
{first}
import torch
from spmd_moe import MoEMesh
torch.ones(2).sum()
print(MoEMesh.single()[spmd_moe.TP])
"""


@pytest.mark.slow
def test_without_numpy_nothing_is_said_first() -> None:
    assert run(WITHOUT_NUMPY.format(first="import spmd_moe")) == "axis 'tp' (1 rank)\n"
    said = run(WITHOUT_NUMPY.format(first="import torch, spmd_moe"))
    assert "Failed to initialize NumPy" in said  # torch's own, which proves the test
