"""The oldest supported spmd_types: the package imports with it, core tests pass, checks refuse.

Installs it into a temporary folder, so the test needs an index of packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.docs_blocks import ROOT

OLDEST = "0.2.3"
# Without the typing rules of autograd functions: spmd_types 0.3.1 has them.
FILES = ("test_mesh", "test_placement", "test_redistribute", "test_shard_shape")
RULES = "not test_types and not test_sums_take_partials_only"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the oldest version comes first."""
    folder = tmp_path_factory.mktemp("oldest")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, f"spmd_types=={OLDEST}"], check=True, timeout=300)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def run(environment: dict[str, str], *words: str, seconds: int = 1800) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return f"{done.stdout}{done.stderr}\nstatus {done.returncode}"


def test_core_tests_pass(old: dict[str, str]) -> None:
    files = [str(Path(__file__).parent / f"{name}.py") for name in FILES]
    said = run(old, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", RULES, *files)
    assert said.endswith("status 0"), said[-3000:]
    assert " passed" in said


def test_a_layer_equals_one_process(old: dict[str, str]) -> None:
    said = run(old, str(ROOT / "examples" / "02_layer.py"))
    assert "outputs and gradients equal those of one process" in said, said[-3000:]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    said = run(old, *launcher, str(ROOT / "examples" / "02_layer.py"))
    assert said.count("outputs and gradients equal those of one process") == 4, said[-3000:]


def test_checks_say_what_to_install(old: dict[str, str]) -> None:
    said = run(old, "-m", "spmd_moe", "check", "tests.support.faulty_targets:good", "--world", "2")
    assert f"spmd_types {OLDEST} is installed, and checks need 0.3.1 or newer" in said, said
    assert "Traceback" not in said
    said = run(old, "-c", "import spmd_moe.mypy_plugin")
    assert "spmd_types 0.3.1 or newer is needed" in said, said
