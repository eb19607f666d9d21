"""Reasons why a comparison was not possible: a refusal, or a message of five parts."""

from __future__ import annotations

import functools
import re
import traceback
from pathlib import Path
from typing import final

import torch

from spmd_moe.check.parity.built_target import Question, RefusedError
from spmd_moe.check.target import CannotCheckError, cannot, checker_error
from spmd_moe.check.thread_ranks import RanksError
from spmd_moe.core.messages import is_users, short_path


@final
class RemoteError(Exception):
    """An error of another process: its name and message, and the line of the user's code."""

    def __init__(self, said: str, at: str, checkers: bool = False) -> None:
        super().__init__(said, at, checkers)
        self.said, self.at, self.checkers = said, at, checkers


def failure(error: RanksError, where: str = "") -> tuple[str, str]:
    """The reason why a layout is refused, and the reason why it failed; one of the two is empty."""
    if error.stuck and not error.errors:
        at = f" at {error.where}" if error.where else ""
        one, *more = error.stuck
        who = f"ranks {error.stuck} wait for each other" if more else f"rank {one} waits"
        what = f"{who} without end{at}"
        why = "they do not issue the same collectives in the same order"
        fix = "issue each collective on every rank, with no rows where there are none"
        return "", str(cannot("TARGET", what, why, fix))
    ranks = sorted(error.errors)
    refusals = [e for e in error.errors.values() if isinstance(e, RefusedError)]
    if refusals and len(refusals) == len(ranks):
        return str(refusals[0]), ""
    asked = next((e for e in error.errors.values() if isinstance(e, CannotCheckError)), None)
    if asked is not None:
        return "", str(asked)
    first = error.errors[ranks[0]]
    every = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return "", raised_on(where or every, first)


def at_target(text: str, question: Question) -> str:
    """Replace an unknown line with that of the target."""
    target: object = question.target
    while isinstance(target, functools.partial):
        target = target.func
    code = getattr(target, "__code__", None)
    line = (
        f"{short_path(code.co_filename)}:{code.co_firstlineno}" if code is not None else "unknown"
    )
    return text.replace("  at:  unknown", f"  at:  {line}")


def raised_on(where: str, error: BaseException) -> str:
    if is_checkers(error):
        return str(checker_error(error, "unknown"))
    said = error.said if isinstance(error, RemoteError) else told(error)
    at = error.at if isinstance(error, RemoteError) else innermost_line(error)
    what = f"on {where} it raises {said}"
    why = "what does not run cannot be compared"
    fix = "raise ValueError   # where a layout is refused"
    text = str(cannot("TARGET", what, why, fix))
    return text.rpartition("\n")[0] + f"\n  at:  {at}"


def is_checkers(error: BaseException) -> bool:
    """Whether parity's own code raised it, not the module or the target that it calls."""
    if isinstance(error, RemoteError):
        return error.checkers
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if not f.filename.startswith(str(Path(torch.__file__).parent))]
    calls = {"prepare", "call", "backward", "_train"}
    return bool(ours) and _is_ours(ours[-1].filename) and ours[-1].name not in calls


def _is_ours(file: str) -> bool:
    return file.startswith(str(Path(__file__).parent))


def told(error: BaseException) -> str:
    """The name and the first line of an error."""
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said[:300]}"


def innermost_line(error: BaseException) -> str:
    """The innermost line that is neither torch's nor the checker's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[1])
    theirs = str(Path(torch.__file__).parent)
    mine = [f for f in frames if not f.filename.startswith((ours, theirs))]
    last = (mine or list(frames))[-1] if frames else None
    return f"{short_path(last.filename)}:{last.lineno}" if last is not None else "unknown"


def innermost_of_dump(text: str) -> str:
    """As `innermost_line`, for the text that faulthandler wrote."""
    for file, number in re.findall(r'File "(.+)", line (\d+) in', text):
        if is_users(file):
            return f"{short_path(file)}:{number}"
    return ""
