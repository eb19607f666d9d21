"""`spmd-moe`: the checks from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from spmd_moe.check.command_check import CHECK
from spmd_moe.check.command_plan import PLAN
from spmd_moe.core.errors import SpmdMoeError

# Every subcommand, in the order of `--help`.
SUBCOMMANDS = (CHECK, PLAN)
INTERRUPTED = 130  # as a shell reports a program that SIGINT ended


def main(words: Sequence[str] | None = None) -> int:
    try:
        args = parser().parse_args(words)
        return int(args.run(args))
    except SpmdMoeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spmd-moe: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = _Parser("spmd-moe", description="Checks of typed MoE code.")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for each in SUBCOMMANDS:
        sub = commands.add_parser(
            each.name,
            help=each.summary,
            description=each.description,
            epilog=each.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        each.add_options(sub)
        sub.set_defaults(run=each.run)
    return made


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")
