"""`spmd-moe parity` on the command line."""

from __future__ import annotations

import argparse
import functools
import re

from spmd_moe.check.adapters import ADAPTERS, adapted
from spmd_moe.check.layouts import Layout
from spmd_moe.check.load_target import load
from spmd_moe.check.parity.axis_groups import MeshSizes
from spmd_moe.check.parity.built_target import AnyLayout, AnyTarget, wants_moe_mesh
from spmd_moe.check.parity.cpu_stand_ins import STAND_INS
from spmd_moe.check.parity.parity import SECONDS, WORLD, run_parity
from spmd_moe.check.parity.processes import Again
from spmd_moe.check.parity.report import line
from spmd_moe.check.parity.run_all_ranks import WAYS
from spmd_moe.check.parity.sweep import Outcome
from spmd_moe.check.subcommands import Subcommand
from spmd_moe.check.target import cannot
from spmd_moe.core.placement import DENSE, EP, ETP

DESCRIPTION = """\
Run a module on every rank of a layout, as threads of this process and in float64, beside one
process that has everything, and compare outputs, gradients of inputs and of parameters, buffers and
parameters after two steps. Needs no types and no annotations. For each difference the report names
the correction.

TARGET is package.module:callable, a function of a mesh (and of a number of tokens):

    from spmd_moe.check import Case

    def target(mesh, tokens=8):                   # a DeviceMesh with the axes of --axes
        block = MyBlock(mesh)                     # or parallelize_module(MyBlock(), mesh["tp"], ..)
        x = torch.randn(tokens, 64)               # the whole input, the same on every rank
        return Case(block, (x,), ("dp 0",), trainer="sum dp")   # x is sharded over dp on dim 0

or the name of a framework's block, such as transformers:mixtral or torchtitan:moe.
"""

EPILOG = """\
exit status: 0 nothing differs, 1 something differs, 2 something could not be compared
"""


def _options(parity: argparse.ArgumentParser) -> None:
    parity.add_argument("target", metavar="TARGET", help="package.module:callable, or FRAMEWORK:..")
    parity.add_argument(
        "--axes", default="", help="axes of the DeviceMesh, outermost first (dp,tp)"
    )
    parity.add_argument(
        "--world", type=int, default=WORLD, help=f"most ranks of a layout ({WORLD})"
    )
    parity.add_argument(
        "--layout", action="append", metavar="SIZES", help="only this one, as 'dp 2 tp 2'; repeat"
    )
    parity.add_argument("--tokens", type=int, nargs="+", default=(), help="numbers of tokens")
    parity.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="an argument of the target and the values to try; repeat",
    )
    parity.add_argument("--plan", help="the plan of a framework's target, such as all_to_all")
    parity.add_argument("--path", help="a directory that holds the framework, in front of others")
    parity.add_argument("--steps", type=int, default=2, help="optimizer steps (2)")
    parity.add_argument("--seconds", type=float, default=SECONDS, help="most for one run (60)")
    parity.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16"),
        default="float64",
        help="precision; below float64 one step runs, and differences within rounding are ignored",
    )
    parity.add_argument(
        "--ranks",
        choices=WAYS,
        default="auto",
        help="threads, gloo processes, or threads with a fallback to processes (auto)",
    )
    parity.add_argument(
        "--stand-in",
        action="append",
        default=[],
        choices=[name for name in STAND_INS if name != "dropout"],
        help="a replacement for what a CPU lacks, during the run; repeat",
    )
    parity.add_argument("--json", action="store_true", help="a report for machines, to stdout")


def _parity(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    framework = args.target.partition(":")[0]
    if framework in ADAPTERS:
        again: Again = functools.partial(adapted, args.target, args.plan, args.path)
    elif args.plan or args.path:
        why = "they choose a framework's own target"
        raise cannot("parity", "--plan and --path are of frameworks", why, "transformers:mixtral")
    else:
        again = functools.partial(load, args.target)
    target = again()
    axes = tuple(name for name in re.split(r"[ ,]+", args.axes) if name)
    vary = dict(_varied(word) for word in args.vary)
    layouts = [_layout(text, target, axes) for text in args.layout] if args.layout else None

    def tell(number: int, of: int, outcome: Outcome) -> None:
        if not args.json:
            print(line(outcome), flush=True)

    report = run_parity(
        target,
        layouts=layouts,
        axes=axes,
        world=args.world,
        tokens=args.tokens,
        vary=vary,
        steps=args.steps,
        seconds=args.seconds,
        stand_ins=args.stand_in,
        dtype=getattr(torch, args.dtype),
        ranks=args.ranks,
        again=again,
        tell=tell,
    )
    print(report.to_json() if args.json else f"\n{report}")
    return report.status


def _varied(word: str) -> tuple[str, list[object]]:
    name, given, values = word.partition("=")
    if not given or not name.isidentifier() or not values:
        why = "it names an argument of the target and its values"
        raise cannot("--vary", f"{word!r} is not like NAME=A,B", why, "--vary ep=True,False")
    return name, [_value(text) for text in values.split(",")]


def _value(text: str) -> object:
    named = {"True": True, "False": False, "None": None}
    if text in named:
        return named[text]
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _layout(text: str, target: AnyTarget, axes: tuple[str, ...]) -> AnyLayout:
    """`dp 2 tp 4`: of MoEMesh by its roles, else of a DeviceMesh in the order given."""
    found = [(name, int(size)) for name, size in re.findall(r"([A-Za-z_]\w*)[ =]+(\d+)", text)]
    names = [name for name, _ in found]
    rest = re.sub(r"([A-Za-z_]\w*)[ =]+(\d+)", "", text).strip(" ,")
    if rest or not found or len(set(names)) < len(names) or not all(size for _, size in found):
        raise cannot("--layout", f"{text!r} is no mesh", "it has axes and sizes", "'dp 2 tp 2'")
    roles = {role.name for role in (*DENSE, EP, ETP)}
    if not axes and wants_moe_mesh(target):
        if not set(names) <= roles:
            why = f"the target takes a MoEMesh, whose axes are {', '.join(sorted(roles))}"
            raise cannot("--layout", f"{text!r} names others", why, "'dp 2 tp 2 ep 4'")
        layout = Layout(**dict(found))
        if layout.world % (layout.ep * layout.etp):
            what = f"ep {layout.ep} x etp {layout.etp} do not divide {layout.world} ranks"
            raise cannot("--layout", what, "experts lie over the same ranks", "'dp 2 tp 2 ep 4'")
        return layout
    return MeshSizes(tuple(found))


PARITY = Subcommand(
    "parity",
    "all ranks of a module beside one process, without types",
    DESCRIPTION,
    EPILOG,
    _options,
    _parity,
)
