"""What an error says, and the lines of the package that it came through."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from types import TracebackType

import spmd_moe

PACKAGE = Path(spmd_moe.__file__).parent
Site = tuple[str, int]


def normal(text: str) -> str:
    """The message without what differs between machines; of spmd_types' own, the first line."""
    text = text.split("\n\n")[0].split("\n  In ")[0]
    return re.sub(r"(at:  ).*", r"\1<the user's line>", text) + "\n"


def sites_passed(trace: TracebackType | None) -> list[Site]:
    frames = traceback.extract_tb(trace)
    return [(f.filename, f.lineno or 0) for f in frames if str(PACKAGE) in f.filename]
