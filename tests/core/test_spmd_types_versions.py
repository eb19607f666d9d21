"""Older versions of spmd_types: the package works with them, core tests pass, checks refuse.

Installs them into temporary folders, so the tests need an index of packages. The core tests run
with the oldest.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.support.docs_blocks import ROOT

VERSIONS = "0.2.3", "0.2.5", "0.3.0"
OLDEST = VERSIONS[0]
# Without the typing rules of autograd functions: spmd_types 0.3.1 has them.
FILES = ("test_mesh", "test_placement", "test_redistribute", "test_shard_shape")
RULES = "not test_types and not test_sums_take_partials_only"

pytestmark = pytest.mark.long


@cache
def environment_of(version: str) -> dict[str, str]:
    """An environment in which this version comes first."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    subprocess.run([*install, f"spmd_types=={version}"], check=True, timeout=300)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}


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


def test_core_tests_pass() -> None:
    old = environment_of(OLDEST)
    files = [str(Path(__file__).parent / f"{name}.py") for name in FILES]
    said = run(old, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", RULES, *files)
    assert said.endswith("status 0"), said[-3000:]
    assert " passed" in said


@pytest.mark.parametrize("version", VERSIONS)
def test_a_layer_equals_one_process(version: str) -> None:
    old = environment_of(version)
    said = run(old, str(ROOT / "examples" / "02_layer.py"))
    assert "outputs and gradients equal those of one process" in said, said[-3000:]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    said = run(old, *launcher, str(ROOT / "examples" / "02_layer.py"))
    assert said.count("outputs and gradients equal those of one process") == 4, said[-3000:]


@pytest.mark.parametrize("version", VERSIONS)
def test_checks_say_what_to_install(version: str) -> None:
    old = environment_of(version)
    said = run(old, "-m", "spmd_moe", "check", "tests.support.faulty_targets:good", "--world", "2")
    assert f"spmd_types {version} is installed, and checks need 0.3.1 or newer" in said, said
    assert "Traceback" not in said and "at:  the command line" in said, said
    said = run(old, "-c", "import spmd_moe.mypy_plugin")
    assert "spmd_types 0.3.1 or newer is needed" in said, said
