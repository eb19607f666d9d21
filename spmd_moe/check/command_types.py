"""`spmd-moe types`: mypy with our plugin, without any settings."""

from __future__ import annotations

import argparse
import subprocess
import sys

from spmd_moe.check.subcommands import Subcommand

DESCRIPTION = """\
Check placements without running the program: runs mypy with the plugin of this package; no settings
are needed. Prints the placement errors and, for each module, how many functions have placements in
their signatures and for how many tensors the placement is known.

    Tokens = Placed[Tensor, DP[V], CP[V], TP[R]]      # what an annotation looks like

    def forward(self, x_TD: Tokens) -> Tokens: ...

Placements between annotations are inferred. A tensor of unknown placement is not checked: annotate
the function or variable it comes from. mypy's own settings are used if there are any (mypy.ini,
.mypy.ini, pyproject.toml, setup.cfg); other mypy errors are counted, not printed.
"""
EPILOG = """\
examples:
  spmd-moe types my_package/
  spmd-moe types my_package/moe.py --strict    # a tensor of unknown placement is an error

exit status: 0 no errors found, 1 errors found, 2 could not check (a path is missing, mypy is not
installed, or no function names a placement), 130 interrupted
"""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="+", help="a file or directory")
    parser.add_argument(
        "--strict", action="store_true", help="treat every module under PATH as strict"
    )


def _types(args: argparse.Namespace) -> int:
    words = [sys.executable, "-m", "spmd_moe.static.run_types", *args.path]
    return subprocess.run(words + ["--strict"] * args.strict, check=False).returncode


TYPES = Subcommand(
    "types", "check placements with mypy, no settings needed", DESCRIPTION, EPILOG, _options, _types
)
