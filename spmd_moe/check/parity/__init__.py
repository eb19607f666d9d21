"""Parity: a parallel module on every rank of a layout, compared with one process.

Needs no types and no annotations. The files, in reading order:

    axes        mesh axes as groups of ranks
    words       placements in words: "dp 0, tp 1"
    stand_ins   replacements for what CPUs lack, installed for one run
    placements  what each rank holds of a tensor: DTensors, words, declarations, shapes
    setup       the target called for one mesh: module, inputs, trainer
    failures    what stood in the way of a comparison
    weights     the weights of the lone module, cut for each rank
    alone       one step or several on one process
    run         the same on a rank
    processes   ranks as gloo processes
    ranks       all ranks, as threads or as processes
    explain     what would make a wrong tensor right
    compare     all tensors of all ranks against one process
    causes      differences with one cause, told as one finding
    sweep       all layouts, token counts and options
    report      text, JSON
    parity      the entry points
    command     the command line
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any, final


@final
class _Called(ModuleType):
    """`spmd_moe.check.parity` is this folder and the function that its last file has."""

    def __call__(self, target: Any, **options: Any) -> Any:
        return import_module(f"{__name__}.parity").parity(target, **options)


sys.modules[__name__].__class__ = _Called
