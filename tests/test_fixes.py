"""Fixes in messages call what exists: a name that was renamed does not live on in a fix."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

from torch.distributed import device_mesh

import spmd_moe.check
from spmd_moe.layer import permute

TESTS = Path(__file__).parent
MESSAGES = (*TESTS.glob("golden/*.txt"), *TESTS.parent.glob("docs/[rc]*/*.md"))
CALLED = re.compile(r"(?<![\w.'])([A-Za-z_]\w*)\(")  # not a method, and not inside a text
USERS = {"S", "layer", "moe"}  # the kind in a placement, and modules of the user


def test_fixes_call_what_exists() -> None:
    modules = (spmd_moe, spmd_moe.check, permute, device_mesh, builtins)
    known = {name for module in modules for name in dir(module)} | USERS
    texts = "\n".join(file.read_text() for file in MESSAGES)
    fixes = re.findall(r"^\s+fix: (.*)", texts, re.M)
    called = {name for fix in fixes for name in CALLED.findall(fix.split("   #")[0])}
    assert len(fixes) > 100 and "declare_placements" in called
    assert called <= known
