"""`spmd-moe`: the checks from the command line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from spmd_moe.check.findings import RULES
from spmd_moe.check.layouts import Layout
from spmd_moe.check.plan import make_plan
from spmd_moe.check.reports import line
from spmd_moe.check.run import SECONDS, WORLD, run_checks
from spmd_moe.check.sweep import Result
from spmd_moe.check.target import CannotCheckError, cannot, load
from spmd_moe.core.errors import SpmdMoeError

VALUE_WORLD = 4
CHECK = """\
Run a module as single ranks of worlds that are not there, with every tensor typed: all layouts of
up to --world ranks, several numbers of tokens, the coordinates where something can differ. Needs
one process and no GPU.

TARGET is package.module:callable, a function (mesh, tokens) -> Case:

    from spmd_moe.check import Case

    def target(mesh, tokens):
        layer = MyLayer(mesh)                       # parameters declare their placements
        x = torch.randn(tokens, 64)                 # the tokens of one cell of dp and cp
        return Case(layer, (x,), (Placed[Tensor, DP[V], CP[V], TP[R]],))

exit status: 0 nothing found, 1 something found, 2 could not check
"""


PLAN = """\
Say what a layout means for a module before anything runs: rows per rank, what each parameter owes
and where it is stored, what divides each loss term, and every collective with its bytes. TARGET is
what `spmd-moe check` takes. A layout that is refused is told with the nearest that is not.
"""


def main(words: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except SpmdMoeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left behind", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("spmd-moe", description="Checks of typed MoE code.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rules = "rules:\n" + "\n".join(f"  {name:<8} {text}" for name, text in RULES.items())
    check = commands.add_parser(
        "check",
        help="trace a module on many layouts",
        description=CHECK,
        epilog=rules,
        formatter_class=raw,
    )
    check.add_argument("target", metavar="TARGET", help="package.module:callable")
    check.add_argument(
        "--world", type=int, help=f"most ranks of a layout ({WORLD}; with --values {VALUE_WORLD})"
    )
    check.add_argument(
        "--values", action="store_true", help="also run all ranks, and compare with one process"
    )
    check.add_argument(
        "--layout",
        action="append",
        type=layout,
        metavar="DEGREES",
        help="only this one, as 'dp 2 tp 4 ep 8'; may be repeated",
    )
    check.add_argument(
        "--tokens", type=int, nargs="+", default=(), help="numbers of tokens, in place of ours"
    )
    check.add_argument(
        "--package", action="append", default=[], help="look at the code of this package too"
    )
    check.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (all cores)"
    )
    check.add_argument("--seconds", type=float, default=SECONDS, help="most for one layout (60)")
    check.add_argument("--json", action="store_true", help="a report for machines, to stdout")
    check.add_argument("--junit", type=Path, metavar="FILE", help="a report for CI, to a file")
    check.set_defaults(run=_check)
    plan = commands.add_parser(
        "plan",
        help="rows, obligations and collectives of a layout",
        description=PLAN,
        formatter_class=raw,
    )
    plan.add_argument("target", metavar="TARGET", help="package.module:callable")
    plan.add_argument(
        "--layout", type=layout, default=Layout(), metavar="DEGREES", help="as 'dp 2 tp 4 ep 8'"
    )
    plan.add_argument("--tokens", type=int, default=16, help="in each cell of dp and cp (16)")
    plan.add_argument("--rank", type=int, default=0, help="whose rows are meant (0)")
    plan.set_defaults(run=_plan)
    return parser


def _plan(args: argparse.Namespace) -> int:
    if not 0 <= args.rank < args.layout.world or args.tokens < 0:
        what = (
            f"rank {args.rank} and {args.tokens} tokens are not of a world of {args.layout.world}"
        )
        raise cannot("plan", what, "ranks are counted from 0", "--rank 0 --tokens 16")
    try:
        print(make_plan(load(args.target), args.layout, args.tokens, args.rank))
    except CannotCheckError:
        raise
    except ValueError as error:  # the module refuses it, and says what is the nearest
        print(error)
        return 1
    return 0


def layout(text: str) -> Layout:
    """`dp 2 tp 4 ep 8` or `dp=2,tp=4,ep=8`."""
    found = re.findall(r"(\w+)[ =]+(\d+)", text)
    names = {"dp", "cp", "tp", "ep", "etp"}
    degrees = {name: int(size) for name, size in found}
    rest = re.sub(r"(\w+)[ =]+(\d+)", "", text).strip(" ,")
    if rest or not found or not set(degrees) <= names or min(degrees.values()) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 'dp 2 tp 4 ep 8'")
    made = Layout(**degrees)
    if made.world % (made.ep * made.etp):
        share = f"ep {made.ep} x etp {made.etp} do not divide {made.world} ranks"
        raise argparse.ArgumentTypeError(f"{text!r}: {share}")
    return made


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
