"""`spmd-moe types`: mypy with our plugin, without any settings."""

from __future__ import annotations

import argparse
import subprocess
import sys

from spmd_moe.check.subcommands import Subcommand

DESCRIPTION = """\
Check placements without running anything: mypy reads the files with our plugin, and nothing has to
be configured. Printed are the placement errors; then, for each module, how many of its functions
name placements, and of how many tensors the placement is known.

    Tokens = Placed[Tensor, DP[V], CP[V], TP[R]]      # what an annotation looks like

    def forward(self, x_TD: Tokens) -> Tokens: ...

What is between the annotations is inferred. Of an unknown tensor nothing is checked: declare what
it is made by. mypy's own settings are used if there are any (mypy.ini, .mypy.ini, pyproject.toml,
setup.cfg); other errors of mypy's are counted, and not printed.
"""
EPILOG = """\
examples:
  spmd-moe types my_package/
  spmd-moe types my_package/moe.py --strict    # a tensor of which nothing is known is an error

exit status: 0 nothing found, 1 something found, 2 could not check (a path is missing, mypy is not
installed, or no function names a placement), 130 interrupted
"""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="+", help="a file or directory")
    parser.add_argument(
        "--strict", action="store_true", help="take every module under PATH to be strict"
    )


def _types(args: argparse.Namespace) -> int:
    words = [sys.executable, "-m", "spmd_moe.static.run_types", *args.path]
    return subprocess.run(words + ["--strict"] * args.strict, check=False).returncode


TYPES = Subcommand(
    "types", "check placements with mypy, no settings needed", DESCRIPTION, EPILOG, _options, _types
)
