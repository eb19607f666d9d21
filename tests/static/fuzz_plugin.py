"""mypy with the plugin and without, over large packages that have no placements: who notices?

    pip install --no-deps --target packages sympy networkx
    python -m tests.static.fuzz_plugin --path packages torch spmd_types sympy networkx

The plugin must not: no error of its own, none of its codes, the same errors of mypy's, and little
time. Times are of the processor, so that other programs count less; the runs with the plugin and
those without alternate, cold (with no cache) and warm, and the minimum of each is reported. Such
pairs differ by more than the plugin takes; the share of one run is reported too (timed_plugin.py).
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from spmd_moe.static.problems_found import RAISE

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """[mypy]
check_untyped_defs = True
ignore_missing_imports = True
follow_imports = silent
"""
OURS, TIMED = "spmd_moe.mypy_plugin", "tests.bench.mypy_plugin"
WARM = 3  # runs after each cold one
REPORTED = re.compile(r"^.+?:\d+: error: .*$", re.M)


TROUBLE = re.compile(
    r"^.*(?:INTERNAL ERROR|Traceback \(most|errors prevented further|Can't find).*$", re.M
)


@dataclass(frozen=True)
class Run:
    """What mypy said, and the seconds of the processor that it took."""

    said: str
    seconds: float

    def errors(self) -> frozenset[str]:
        return frozenset(REPORTED.findall(self.said))


def run(package: str, folder: Path, path: str, plugin: str) -> Run:
    """One run of mypy, which keeps its cache in the folder."""
    name = plugin or "none"
    config = folder / f"{name}.ini"
    config.write_text(SETTINGS + (f"plugins = {plugin}\n" if plugin else ""))
    words = ["--config-file", str(config), "--cache-dir", str(folder / name), "--no-pretty"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": path, RAISE: "1"}
    environment["PYTHONHASHSEED"] = "0"  # some of mypy's own errors follow the order of sets
    program = plugin if plugin == TIMED else "mypy"
    command = [sys.executable, "-m", program, *words, "--no-error-summary", "-p", package]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(done.stdout + done.stderr, took)


def examine(package: str, path: str, rounds: int) -> bool:
    """Whether the plugin stays unnoticed; what is seen of it is printed."""
    runs: dict[tuple[str, str], list[Run]] = {}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(rounds):
            for plugin in ("", OURS) if turn % 2 else (OURS, ""):
                shutil.rmtree(Path(name, plugin or "none"), ignore_errors=True)
                for state in ("cold", *["warm"] * WARM):
                    found = run(package, Path(name), path, plugin)
                    runs.setdefault((state, plugin), []).append(found)
        inside = {state: run(package, Path(name), path, TIMED).said for state in ("cold", "warm")}
    for state in ("cold", "warm"):
        without, ours = (min(r.seconds for r in runs[state, plugin]) for plugin in ("", OURS))
        print(f"{package}, {state}: {without:.2f} s, with the plugin {ours / without - 1:+.1%}")
        print(f"{package}, {state}: {inside[state].strip()}")
    return unnoticed(package, runs["cold", ""][0], runs["cold", OURS][0])


def unnoticed(package: str, without: Run, ours: Run) -> bool:
    broken = [line for one in (without, ours) for line in TROUBLE.findall(one.said)]
    differing = sorted(without.errors() ^ ours.errors())
    codes = sum("[placement" in line for line in differing)
    print(
        f"{package}: {len(without.errors())} errors of mypy's, {len(differing)} of one run alone, "
        f"{codes} of our codes, {len(broken)} breakdowns",
        *[*differing, *broken][:20],
        sep="\n  ",
        flush=True,
    )
    return not (broken or differing)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--path", default="", help="the folder of those that are not installed")
    parser.add_argument("--rounds", type=int, default=2, help="of a cold run and three warm ones")
    args = parser.parse_args()
    noticed = [name for name in args.packages if not examine(name, args.path, args.rounds)]
    return 1 if noticed else 0


if __name__ == "__main__":
    sys.exit(main())
