"""`spmd-moe check`: trace a module on many layouts."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from spmd_moe.check.check_layout import Result
from spmd_moe.check.reports import failed_json, failed_junit, line
from spmd_moe.check.rules import rules_text
from spmd_moe.check.run import SECONDS, WORLD, run_checks
from spmd_moe.check.subcommands import Subcommand, layout, number, seconds, shown
from spmd_moe.check.target import COMMAND_LINE, CannotCheckError, cannot
from spmd_moe.core.errors import SpmdMoeError, plural

VALUE_WORLD = 4
LARGEST_SWEEP = 1024  # ranks; the number of layouts grows faster than this
DESCRIPTION = """\
Run a module as single ranks of worlds that do not exist, with every tensor typed: all layouts of
up to --world ranks, several numbers of tokens, every coordinate where something can differ. Needs
one process and no GPU.

TARGET is package.module:callable or path/to/file.py:callable, a function (mesh, tokens) -> Case:

    from spmd_moe.check import Case

    def target(mesh, tokens):
        layer = MyLayer(mesh)                       # parameters declare their placements
        x = torch.randn(tokens, 64)                 # the tokens of one cell of dp and cp
        return Case(layer, (x,), (Placed[Tensor, DP[V], CP[V], TP[R]],))
"""
EPILOG = f"""\
examples:
  spmd-moe check my_package.my_module:target               # all layouts of up to {WORLD} ranks
  spmd-moe check my_file.py:target --layout 'dp 2 tp 4 ep 8' --tokens 0 1 5
  spmd-moe check my_file.py:target --values                # also with real numbers on every rank
  spmd-moe check my_file.py:target --json > report.json    # what the target prints goes to stderr

rules, and the words that allow a line to break them (# spmd: allow WORD - reason):
{rules_text()}

exit status: 0 nothing found, 1 something found, 2 could not check (the target cannot be imported
or built, dies, hangs, or refuses every layout; or the checker failed), 130 interrupted
"""


def _options(check: argparse.ArgumentParser) -> None:
    check.add_argument("target", metavar="TARGET", help="module:callable or file.py:callable")
    check.add_argument(
        "--world",
        type=number(1, LARGEST_SWEEP),
        help=f"ranks of the largest layout (default: {WORLD}; with --values {VALUE_WORLD})",
    )
    check.add_argument(
        "--values", action="store_true", help="also run all ranks, and compare with one process"
    )
    check.add_argument(
        "--layout",
        action="append",
        type=layout,
        metavar="DEGREES",
        help="check only this layout, as 'dp 2 tp 4 ep 8'; may be repeated",
    )
    check.add_argument(
        "--tokens", type=number(0), nargs="+", default=(), help="numbers of tokens to try"
    )
    check.add_argument(
        "--package", action="append", default=[], help="check the code of this package too"
    )
    check.add_argument(
        "--jobs", type=number(1), default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    check.add_argument(
        "--seconds",
        type=seconds,
        default=SECONDS,
        help=f"time limit for a layout, and for the start (default: {SECONDS:g})",
    )
    check.add_argument("--json", action="store_true", help="print a report for machines to stdout")
    check.add_argument("--junit", type=Path, metavar="FILE", help="write a report for CI to a file")


def _check(args: argparse.Namespace) -> int:
    progress = Progress(quiet=args.json)
    try:
        _write(args.junit, "")  # find out now; an old report is none
        report = run_checks(
            args.target,
            world=_world(args),
            values=args.values,
            chosen=args.layout,
            tokens=args.tokens,
            packages=args.package,
            jobs=args.jobs,
            seconds=args.seconds,
            tell=progress,
        )
        progress.end()
        _write(args.junit, report.to_junit())
    except SpmdMoeError as error:
        with suppress(CannotCheckError):
            _write(args.junit, failed_junit(args.target, str(error)))
        if args.json:
            print(failed_json(args.target, str(error)))
        raise
    finally:
        progress.end()
    print(report.to_json() if args.json else f"\n{report}")
    return 0 if report.ok else 1


def _write(path: Path | None, text: str) -> None:
    """Write the report for CI, if one is asked for."""
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        what = f"{shown(str(path))} cannot be written: {type(error).__name__}"
        why = "the report of the check is written there"
        fix = "--junit report.xml   # in a directory that exists"
        raise cannot("--junit", what, why, fix, at=COMMAND_LINE) from None


class Progress:
    """A line for each layout; on a terminal, also how far the check has come."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.bar = quiet, sys.stderr.isatty()
        self.found, self.begin = 0, time.monotonic()
        self._show("starting ...")

    def __call__(self, number: int, of: int, result: Result) -> None:
        self.end()
        self.found += len(result.findings)
        if not self.quiet:
            print(line(result), flush=True)
        done = 30 * number // of
        left = (time.monotonic() - self.begin) / number * (of - number)
        found = plural(self.found, "finding")
        bar = "#" * done + "." * (30 - done)
        self._show(f"[{bar}] {number} of {of} layouts, {found}, about {duration(left)} left")

    def _show(self, text: str) -> None:
        if self.bar:
            print(text, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        self._show("\r\x1b[K")


def duration(left: float) -> str:
    """`8 s`, `3 min`, `2 h 5 min`."""
    minutes = round(left / 60)
    if left < 100:
        return f"{left:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _world(args: argparse.Namespace) -> int:
    usual = VALUE_WORLD if args.values else WORLD
    return usual if args.world is None else int(args.world)


CHECK = Subcommand("check", "trace a module on many layouts", DESCRIPTION, EPILOG, _options, _check)
