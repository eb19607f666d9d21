"""Checks in one process: plan, traced and with values. Nothing in the layer imports them.

Read in this order:

    target, layouts, run, check_layout        what is checked, on which layouts, in which processes
    trace, mirror_world                       one rank of a world, run in this process
    signatures, check_declarations            declared placements, compared with what exists
    observer, source_lines, tensor_origin     every operation of checked code
    follow_sharded_dims                       dims that are cut, followed to where it matters
    checker_escapes, compare_coordinates      what the source shows, and several runs together
    compare_one_process, thread_ranks, whole_tensors    all ranks as threads, with real numbers
    parity/, adapters/                        any module beside one process, without types
    findings, reports                         the rules; how findings are shown
    plan, forecast                            collectives and bytes, from sizes alone
    command_line                              `spmd-moe`
"""

from importlib import import_module
from typing import TYPE_CHECKING

# The static check reads `check.rules` and must not load torch: the rest is loaded when asked for.
if TYPE_CHECKING:
    from spmd_moe.check.layouts import Layout as Layout
    from spmd_moe.check.layouts import layouts as layouts
    from spmd_moe.check.parity.axis_groups import MeshSizes as MeshSizes
    from spmd_moe.check.parity.parity import parity as parity
    from spmd_moe.check.parity.parity import run_parity as run_parity
    from spmd_moe.check.parity.report import ParityReport as ParityReport
    from spmd_moe.check.plan import Plan as Plan
    from spmd_moe.check.plan import make_plan as make_plan
    from spmd_moe.check.reports import Report as Report
    from spmd_moe.check.run import check as check
    from spmd_moe.check.run import run_checks as run_checks
    from spmd_moe.check.target import CannotCheckError as CannotCheckError
    from spmd_moe.check.target import Case as Case
else:
    _HOME = {
        "Layout": "layouts",
        "layouts": "layouts",
        "MeshSizes": "parity.axis_groups",
        "parity": "parity.parity",
        "run_parity": "parity.parity",
        "ParityReport": "parity.report",
        "Plan": "plan",
        "make_plan": "plan",
        "Report": "reports",
        "check": "run",
        "run_checks": "run",
        "CannotCheckError": "target",
        "Case": "target",
    }
    __all__ = list(_HOME)

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # `layouts` is a module as well, and its function is meant
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME})
