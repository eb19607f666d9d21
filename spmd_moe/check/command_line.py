"""`spmd-moe`: the checks from the command line, and the conversion of checkpoints."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from spmd_moe.check.command_check import CHECK
from spmd_moe.check.command_convert import CONVERT
from spmd_moe.check.command_plan import PLAN
from spmd_moe.check.command_types import TYPES
from spmd_moe.check.parity.command import PARITY
from spmd_moe.check.target import checker_error
from spmd_moe.core.errors import SpmdMoeError
from spmd_moe.core.messages import printable

# Every subcommand, in the order of `--help`.
SUBCOMMANDS = (CHECK, PLAN, PARITY, TYPES, CONVERT)
RAW = argparse.RawDescriptionHelpFormatter
DESCRIPTION = "Checks of typed MoE code, before anything is trained, and conversion of checkpoints."
EPILOG = """\
examples:
  spmd-moe plan my_package.my_module:target --layout 'dp 2 tp 4 ep 8'
  spmd-moe check my_package.my_module:target
  spmd-moe types my_package/
  spmd-moe check --help         # what a target is, the rules, the words that allow exceptions

exit status: 0 nothing found, 1 something found, 2 could not check, 130 interrupted
"""
INTERRUPTED = 130  # as a shell reports a program that SIGINT ended


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # every terminal shows the full message
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser().parse_args(words)
        return int(args.run(args))
    except SpmdMoeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spmd-moe: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `spmd-moe check ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except Exception as error:
        print(checker_error(error, "unknown"), file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = _Parser("spmd-moe", description=DESCRIPTION, epilog=EPILOG, formatter_class=RAW)
    version = sys.modules["spmd_moe"].__version__  # which no file of the package imports
    made.add_argument("--version", action="version", version=f"spmd_moe {version}")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for each in SUBCOMMANDS:
        sub = commands.add_parser(
            each.name,
            help=each.summary,
            description=each.description,
            epilog=each.epilog,
            formatter_class=RAW,
        )
        each.add_options(sub)
        sub.set_defaults(run=each.run)
    return made


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one short line of ASCII, without the usage."""

    def error(self, message: str) -> NoReturn:
        text = printable(" ".join(message.splitlines()))  # it may quote any words
        text = text.encode("ascii", "backslashreplace").decode()
        text = text if len(text) <= 300 else f"{text[:300]} ..."
        self.exit(2, f"{self.prog}: {text}; see {self.prog} --help\n")
