"""`spmd-moe check`: trace a module on many layouts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from spmd_moe.check.reports import line
from spmd_moe.check.rules import rules_text
from spmd_moe.check.run import SECONDS, WORLD, run_checks
from spmd_moe.check.subcommands import Subcommand, layout, number, seconds
from spmd_moe.check.sweep import Result
from spmd_moe.check.target import cannot, load

VALUE_WORLD = 4
LARGEST_SWEEP = 1024  # ranks; the number of layouts grows faster than this
DESCRIPTION = """\
Run a module as single ranks of worlds that do not exist, with every tensor typed: all layouts of
up to --world ranks, several numbers of tokens, every coordinate where something can differ. Needs
one process and no GPU.

TARGET is package.module:callable, a function (mesh, tokens) -> Case:

    from spmd_moe.check import Case

    def target(mesh, tokens):
        layer = MyLayer(mesh)                       # parameters declare their placements
        x = torch.randn(tokens, 64)                 # the tokens of one cell of dp and cp
        return Case(layer, (x,), (Placed[Tensor, DP[V], CP[V], TP[R]],))
"""
EPILOG = f"""\
rules:
{rules_text()}

exit status: 0 nothing found, 1 something found, 2 could not check
"""


def _options(check: argparse.ArgumentParser) -> None:
    check.add_argument("target", metavar="TARGET", help="package.module:callable")
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
        "--seconds", type=seconds, default=SECONDS, help="time limit per layout (default: 60)"
    )
    check.add_argument("--json", action="store_true", help="print a report for machines to stdout")
    check.add_argument("--junit", type=Path, metavar="FILE", help="write a report for CI to a file")


def _check(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)  # tensors are small, and other processes are forked from this one
    if args.junit is not None and not args.junit.resolve().parent.is_dir():
        what, why = f"there is no directory for {args.junit}", "the report is written at the end"
        raise cannot("--junit", what, why, f"mkdir -p {args.junit.parent}")
    progress = _Progress(quiet=args.json)
    report = run_checks(
        load(args.target),
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
    if args.junit is not None:
        args.junit.write_text(report.to_junit())
    print(report.to_json() if args.json else f"\n{report}")
    return 0 if report.ok else 1


class _Progress:
    """A line for each layout; on a terminal, also how far it has come."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.bar = quiet, sys.stderr.isatty()
        self.found = 0

    def __call__(self, number: int, of: int, result: Result) -> None:
        self.end()
        self.found += len(result.findings)
        if not self.quiet:
            print(line(result), flush=True)
        if self.bar:
            done = 30 * number // of
            bar = "#" * done + "." * (30 - done)
            said = f"[{bar}] {number} of {of} layouts, {self.found} findings"
            print(said, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.bar:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _world(args: argparse.Namespace) -> int:
    usual = VALUE_WORLD if args.values else WORLD
    return usual if args.world is None else int(args.world)


CHECK = Subcommand("check", "trace a module on many layouts", DESCRIPTION, EPILOG, _options, _check)
