"""`spmd-moe plan`: rows, obligations, losses and collectives of one layout."""

from __future__ import annotations

import argparse
from functools import partial

from spmd_moe.check.layouts import Layout
from spmd_moe.check.plan import make_plan
from spmd_moe.check.run import SECONDS, run_apart
from spmd_moe.check.subcommands import Subcommand, layout, number, seconds
from spmd_moe.check.target import COMMAND_LINE, CannotCheckError, Target, cannot

DESCRIPTION = """\
Print what a layout means for a module before anything runs: rows per rank, what each parameter's
gradient still needs and how it is stored, what divides each loss term, and every collective with
its bytes. TARGET is what `spmd-moe check` takes. For a layout that the module refuses, the error
names the nearest layout that works.
"""

EPILOG = """\
examples:
  spmd-moe plan my_package.my_module:target --layout 'dp 2 tp 4 ep 8' --tokens 5

exit status: 0 the plan is printed, 1 the module refuses the layout, 2 it could not be planned
"""


def _options(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("target", metavar="TARGET", help="module:callable or file.py:callable")
    plan.add_argument(
        "--layout", type=layout, default=Layout(), metavar="DEGREES", help="as 'dp 2 tp 4 ep 8'"
    )
    plan.add_argument(
        "--tokens", type=number(0), default=16, help="tokens per cell of dp and cp (default: 16)"
    )
    plan.add_argument(
        "--rank", type=number(0), default=0, help="the rank whose rows are shown (default: 0)"
    )
    plan.add_argument(
        "--seconds", type=seconds, default=SECONDS, help=f"time limit (default: {SECONDS:g})"
    )


def _plan(args: argparse.Namespace) -> int:
    if args.rank >= args.layout.world:
        what = f"there is no rank {args.rank} in a world of {args.layout.world}"
        fix = f"--rank {args.layout.world - 1}"
        raise cannot("--rank", what, "ranks are counted from 0", fix, at=COMMAND_LINE)
    status, text = run_apart(args.target, partial(_planned, args), args.seconds)
    print(text)
    return status


def _planned(args: argparse.Namespace, target: Target) -> tuple[int, str]:
    try:
        return 0, str(make_plan(target, args.layout, args.tokens, args.rank))
    except CannotCheckError:
        raise
    except ValueError as error:  # the module refuses the layout; its message names the nearest
        return 1, str(error)


PLAN = Subcommand(
    "plan", "rows, obligations and collectives of a layout", DESCRIPTION, EPILOG, _options, _plan
)
