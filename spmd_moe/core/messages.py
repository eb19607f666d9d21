"""Text of error messages: the five parts, counts, paths, kinds and the user's line. Without torch.

A message has five parts in a fixed order: where it happened, what is there and what is needed, why
that cannot work, what to write instead, and the line of the user's program. Shapes and types may
stand in it, values never: a value can be secret, huge, or different on every rank.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

LONGEST_PART = 2000  # characters of one part; the text of another library's error may be huge


def explain(
    where: str, what: str, *, why: str, fixes: Iterable[str] = (), at: str | None = None
) -> str:
    """The text of an error: `what` says what is there and what is needed."""
    first = f"{where}: {what.removesuffix('.')}."
    lines = [first, *notes(f"{why}.", fixes), f"  at:  {at or users_line()}"]
    return "\n".join(map(printable, lines))


def notes(why: str, fixes: Iterable[str]) -> Iterator[str]:
    """The third and fourth part of a message, a line each."""
    yield f"  why: {why}"
    yield from (f"  fix: {fix}" for fix in fixes)


def parts_of(text: str) -> dict[str, str | list[str]]:
    """The parts of a message by name, for reports that machines read."""
    first, *rest = text.splitlines() or [""]
    marked = [(line[2:5], line[6:].strip()) for line in rest]
    why = next((said for mark, said in marked if mark == "why"), "")
    return {
        "message": first,
        "why": why,
        "fixes": [said for mark, said in marked if mark == "fix"],
    }


def at_line(text: str, at: str) -> str:
    """The same message, at another line."""
    kept = [line for line in text.splitlines() if not line.startswith("  at:")]
    return "\n".join([*kept, f"  at:  {at}"])


# Control characters, lone surrogates, and the characters that XML does not know.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """`text` as every terminal, JSON and XML file can hold it, and not longer than is useful."""
    if len(text) > LONGEST_PART:
        text = f"{text[:LONGEST_PART]} ... ({len(text) - LONGEST_PART} more characters)"
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def text_of(error: BaseException) -> str:
    """The text of any error, also of one that raises when it is asked for its text."""
    try:
        return str(error)
    except Exception as other:
        return f"its text cannot be shown ({type(other).__name__})"


def one_line(error: BaseException) -> str:
    """The text of any error on one line."""
    return " ".join(text_of(error).split())


def plural(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def kinds_text(kinds: Iterable[tuple[object, object]]) -> str:
    """Kinds by axis or role, as a placement prints: `dp:V tp:S(0)`."""
    return " ".join(
        f"{axis}:{kind if isinstance(kind, str) else repr(kind)}" for axis, kind in kinds
    )


def short_path(filename: str) -> str:
    """A path as the user would write it: from the current folder, if it lies below that."""
    return filename.removeprefix(os.getcwd() + os.sep)


# Frames below these packages are ours or our tools', never the line that the user has to change.
_NOT_THE_USER = ("spmd_moe", "spmd_types", "torch", "contextlib", "runpy", "threading")
PACKAGE = str(Path(__file__).parents[1]) + os.sep
_COMMAND = f"{os.sep}spmd-moe"  # the script that pip makes of our command
_MAIN = f"{PACKAGE}__main__.py"
COMMAND_LINE = "the command line"  # the place of an error in its words


_TOOLS = re.compile(
    r"[/\\\\](?:torch|spmd_types|importlib|_pytest)[/\\\\]|[/\\\\]lib[/\\\\]python3\.\d+[/\\\\](?!(site|dist)-packages)|^<"
)


def is_users(file: str) -> bool:
    """Whether a source file is of the user's program, and not of this package or its tools."""
    return not (file.startswith(PACKAGE) or file.endswith(_COMMAND) or _TOOLS.search(file))


def users_line(frame: FrameType | None = None) -> str:
    """`file:line` of the innermost frame outside this package and its tools, from `frame` up."""
    frame = frame or sys._getframe(1)
    unknown = "unknown"
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _MAIN or file.endswith(_COMMAND):
            unknown = COMMAND_LINE
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        # The sanitizer puts code of this package into functions of others: theirs by name only.
        ours = file.startswith(PACKAGE) or file.endswith(_COMMAND)
        if package not in _NOT_THE_USER and not ours:
            return f"{short_path(file)}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return unknown
