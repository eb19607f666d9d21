"""Released versions of frameworks, and what parity must say of them.

    python -m tests.field.released      # runs all and writes the table

Each version is downloaded once, without its dependencies, into a directory of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

CACHE = Path(os.environ.get("SPMD_MOE_FIELD", Path(tempfile.gettempdir()) / "spmd_moe_field"))
# What transformers imports besides torch; the older versions demand an older hub.
HUGGING_FACE = ("tokenizers", "safetensors", "regex", "numpy")


@final
@dataclass(frozen=True, slots=True)
class Release:
    """One version, one target, one plan; `bug` is what is known to be wrong with it."""

    package: str
    version: str
    block: str
    plan: str
    bug: str = ""
    tensor: str = ""  # of which parity must speak
    right: str = ""  # what parity must say of it

    def __str__(self) -> str:
        return f"{self.package} {self.version} {self.block} {self.plan}"


ROUTER = "summed over tp it is right"
RELEASES = [
    Release("transformers", "5.16.1", "mixtral", "ep", "#48205", "mlp.gate.weight", ROUTER),
    Release("transformers", "5.16.1", "qwen3_moe", "ep", "#48205", "mlp.gate.weight", ROUTER),
    Release("transformers", "5.16.1", "mixtral", "tp"),
    Release("transformers", "5.24.0", "mixtral", "all_reduce"),
    Release("transformers", "5.24.0", "mixtral", "all_to_all"),
    Release("transformers", "5.24.0", "qwen3_moe", "all_to_all"),
    Release("transformers", "5.24.0", "deepseek_v3", "all_to_all"),
    Release("transformers", "5.24.0", "gpt_oss", "all_to_all"),
    Release("transformers", "5.24.0", "mixtral", "tp"),
    Release("torchtitan", "0.2.0", "moe", "ep", "#2387", "moe.router.gate.weight", ROUTER),
    Release("torchtitan", "0.2.1", "moe", "ep", "#2387", "moe.router.gate.weight", ROUTER),
    Release("torchtitan", "0.2.2", "moe", "ep", "#2387", "moe.router.gate.weight", ROUTER),
    Release("torchtitan", "0.2.2", "moe", "tp"),
]


def fetched(release: Release) -> str:
    """The directories to import from, downloaded where they are not there."""
    folders = [_install(f"{release.package}-{release.version}", "--no-deps", _pinned(release))]
    if release.package == "transformers":
        old = int(release.version.split(".")[1]) < 18
        hub = "huggingface_hub<2" if old else "huggingface_hub>=2"
        folders.append(_install(f"hub-{'1' if old else '2'}", hub, *HUGGING_FACE))
    return os.pathsep.join(map(str, folders))


def _pinned(release: Release) -> str:
    return f"{release.package}=={release.version}"


def _install(name: str, *wanted: str) -> Path:
    folder = CACHE / name
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *wanted]
        subprocess.run(pip, check=True)
    return folder


def report(release: Release, *words: str) -> dict[str, Any]:
    """What parity says, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "spmd_moe", "parity", "--json"]
    command += [f"{release.package}:{release.block}", "--plan", release.plan]
    command += ["--path", fetched(release), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    if not run.stdout.startswith("{"):
        raise RuntimeError(f"{release}: {run.stderr}")
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def row(release: Release, found: dict[str, Any]) -> str:
    """One line of the table."""
    runs = [run for run in found["runs"] if run["compared"]]
    told = [f"{', '.join(f['tensors'])}: {f['right']}, in {f['in'][0]}" for f in found["findings"]]
    said = "; ".join(told) or f"no finding in {len(runs)} layouts"
    cells = [release.package, release.version, f"{release.block}, {release.plan}"]
    cells += [release.bug or "-", said, f"{found['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print("| package | version | block, plan | known bug | parity says | seconds |")
    print("|---|---|---|---|---|---|")
    for release in RELEASES:
        print(row(release, report(release)), flush=True)


if __name__ == "__main__":
    main()
