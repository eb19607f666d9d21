"""Parity: a parallel module on every rank of a layout, compared with one process.

Needs no types and no annotations. The files, in reading order:

    axis_groups      mesh axes as groups of ranks
    placement_words  placements in words: "dp 0, tp 1"
    cpu_stand_ins    replacements for what CPUs lack, installed for one run
    held_elements    what each rank holds of a tensor: by DTensors, words, declarations, shapes
    built_target     the target called for one mesh: module, inputs, trainer
    cannot_compare   reasons why a comparison was not possible
    weights          the weights of the module on one process, sharded for each rank
    run_one_process  one step or several on one process
    run_one_rank     the same on a rank
    processes        ranks as gloo processes
    run_all_ranks    all ranks, as threads or as processes
    explain          corrections that make a wrong tensor right
    compare          all tensors of all ranks against one process
    merge_findings   differences with one cause, merged
    sweep            all layouts, token counts and options
    report           text, JSON
    parity           the entry points
    command          the command line
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
