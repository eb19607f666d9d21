"""Checks of typed MoE code, the layer's and others'. Nothing in the layer imports this."""

from spmd_moe.check.layouts import Layout as Layout
from spmd_moe.check.layouts import layouts as layouts
from spmd_moe.check.plan import Plan as Plan
from spmd_moe.check.plan import make_plan as make_plan
from spmd_moe.check.reports import Report as Report
from spmd_moe.check.run import check as check
from spmd_moe.check.run import run_checks as run_checks
from spmd_moe.check.target import CannotCheckError as CannotCheckError
from spmd_moe.check.target import Case as Case
