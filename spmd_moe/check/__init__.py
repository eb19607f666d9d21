"""Checks of typed MoE code, the layer's and others'. Nothing in the layer imports this."""

from spmd_moe.check.layout import Layout as Layout
from spmd_moe.check.layout import layouts as layouts
from spmd_moe.check.plan import Plan as Plan
from spmd_moe.check.plan import make_plan as make_plan
from spmd_moe.check.report import Report as Report
from spmd_moe.check.run import check as check
from spmd_moe.check.run import examine as examine
from spmd_moe.check.target import Built as Built
from spmd_moe.check.target import CannotCheckError as CannotCheckError
