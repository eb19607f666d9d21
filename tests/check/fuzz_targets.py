"""Random hostile targets: `spmd-moe check` ends in time, with a true status and one clear message.

    python -m tests.check.fuzz_targets --seconds 3600 --seed 1

`test_command_line.py` runs some with a fixed seed. A target raises, leaves, dies, loops, prints,
returns something odd, or changes the state of its process, at a random place: when it is imported,
built, called, or in backward. Names, files and options are odd too. A case depends on the seed and
its number alone.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.support.command_server import Commands, Done
from tests.support.hostile_sources import (
    DIES,
    LEAVES,
    LOOPS,
    OBJECTS,
    OUTPUTS,
    PRINTS,
    PROGRAM,
    RAISES,
    RETURNS,
    STATES,
)

PLACES = ("import", "target", "init", "forward", "backward")
EARLY = ("import", "target", "init")
LATE = 2.0  # --seconds of a target that loops
GRACE = 40.0  # seconds beyond twice that: the machine is busy
ANY = frozenset({0, 1, 2})
NAMES = (
    "plain",
    "with space",
    "dash-ed",
    "caf\u00e9",
    "quo'te",
    "semi;colon",
    "a.b",
    "json",
    "x" * 200,
)
ATTRIBUTES = (
    "",
    ".",
    "target.",
    ".target",
    "no_such",
    "nn.Linear",
    "t" * 5000,
    "__doc__",
    "\u00b5",
    "a\nb",
)
MODULES = (
    "..",
    "a..b",
    "",
    " ",
    ":",
    "os",
    "builtins",
    "sys",
    "folder",
    "folder.py",
    "/dev/null",
    "-x.py",
    "\x1b[2J",
)
CALLABLES = ("_exit", "exit", "system", "abort", "print", "input", "breakpoint", "target")
OPTIONS = (
    *(("--tokens", text) for text in ("", "-0", "+3", "1e3", "0x1", "\u0661", "2147483647", "nan")),
    *(
        ("--layout", text)
        for text in ("", "tp", "tp 2 ep 3", "tp 0", "TP 2", "tp=2,,ep=2", "\u0664", "tp 2\n")
    ),
    *(("--seconds", text) for text in ("", "inf", "-1", "1e-9", "1e6", "1_0", "one")),
    *(("--package", text) for text in ("", ".", "os", "no such", "torch", "caf\u00e9")),
    *(("--junit", text) for text in ("", ".", "/dev/full", "no/such.xml", "x" * 300, "report.xml")),
    *(("--world", text) for text in ("1", "0", "9" * 30)),
    *(("--jobs", text) for text in ("1", "-1", "1000000")),
    *(("--no-such", text) for text in ("", "\x1b", "x" * 10_000)),
    ("--values",),
)


@dataclass(frozen=True)
class Hostile:
    """A command, and what may come of it."""

    seed: int
    words: list[str]
    source: str
    statuses: frozenset[int]
    file: str = ""  # where the error's line must be, if it must
    sabotage: bool = False  # the process of the target may break the checker in it
    options: bool = False  # an option may be refused before anything runs


def drawn(seed: int, folder: Path) -> Hostile:
    """The case of this seed; writes its program."""
    draw = random.Random(seed)
    base = [
        "check",
        "--layout",
        draw.choice(("dp 2", "tp 2", "dp 2 tp 2")),
        "--tokens",
        "3",
        "--json",
    ]
    if draw.random() < 0.15:
        name = f"{draw.choice(MODULES)}:{draw.choice((*CALLABLES, *ATTRIBUTES))}"
        return Hostile(seed, [*base, f"--seconds={LATE}", "--", name], "", frozenset({2}))
    place, kind = draw.choice(PLACES), draw.choice(("raise", "leave", "die", "loop", "print"))
    act, statuses = _act(draw, place, kind)
    acts, returned, output, target = {place: act}, RETURNS[0], OUTPUTS[0], OBJECTS[0]
    sabotage, changed = False, draw.random()
    if changed < 0.25:
        sabotage, statuses = True, ANY if kind == "print" else frozenset({1, 2})
        acts[place] = f"{draw.choice(STATES)}\n{act}"
    elif changed < 0.4:
        acts, returned, statuses, place = {}, draw.choice(RETURNS[1:]), frozenset({2}), "target"
    elif changed < 0.5:
        acts, output, statuses = {}, draw.choice(OUTPUTS[1:]), frozenset({0, 1})
    elif changed < 0.6:
        acts, target, statuses, place = {}, draw.choice(OBJECTS[1:]), ANY, "odd"
    lines = {name: _indented(acts.get(name, "pass"), name) for name in PLACES}
    source = PROGRAM.format(
        **{f"at_{k}": v for k, v in lines.items()}, returned=returned, output=output
    )
    path = folder / f"{draw.choice(NAMES)}_{seed}.py"
    path.write_text(f"{source}\n{target}\n")
    words = [*base, f"--seconds={LATE if kind == 'loop' or sabotage else 60.0}"]
    options = draw.random() < 0.2
    if options:
        words += draw.choice(OPTIONS)
        statuses = ANY
    in_file = path.name if statuses == {2} and kind != "die" and place != "odd" else ""
    return Hostile(
        seed,
        [*words, "--", f"{path.name}:target"],
        path.read_text(),
        statuses,
        in_file,
        sabotage,
        options,
    )


def _act(draw: random.Random, place: str, kind: str) -> tuple[str, frozenset[int]]:
    if kind == "raise":
        return draw.choice(RAISES), frozenset({2 if place in EARLY else 1})
    if kind == "print":
        return draw.choice(PRINTS), frozenset({0})
    return draw.choice({"leave": LEAVES, "die": DIES, "loop": LOOPS}[kind]), frozenset({2})


def _indented(act: str, place: str) -> str:
    depth = {"import": 0, "target": 4}.get(place, 8)
    return act.replace("\n", "\n" + " " * depth)


def verify(case: Hostile, done: Done) -> str:
    """What is wrong with how the check of a case ended, or nothing."""
    if done.status is None:
        return "it does not end"
    if done.status not in case.statuses:
        return f"status {done.status}, not {sorted(case.statuses)}"
    if done.seconds > 2 * LATE + GRACE:
        return f"it takes {done.seconds:.0f} s"
    if not done.out and done.status == 2:  # an option is refused, or the name of the target
        line = done.err.removesuffix("\n")
        is_line = (
            "\n" not in line and line.isascii() and len(line) < 700 and line.startswith("spmd-moe")
        )
        refused = case.options or ":" not in case.words[-1][1:]
        return "" if is_line and refused else "no report, and no line about an option"
    try:
        said = json.loads(done.out)
    except ValueError:
        return "stdout is not JSON"
    if said["ok"] is not (done.status == 0):
        return f"status {done.status}, and ok is {said['ok']}"
    if done.status < 2:
        texts = [mistake["text"] for mistake in said["mistakes"]]
        return "" if bool(texts) is bool(done.status) else f"{len(texts)} mistakes"
    return _message(case, said["error"], done)


def _message(case: Hostile, text: str, done: Done) -> str:
    if case.sabotage and text:
        return ""
    marks = [line[:6] for line in text.split("\n")[1:]]
    if marks[:1] != ["  why:"] or marks[-1:] != ["  at: "] or set(marks[1:-1]) != {"  fix:"}:
        return "the message does not have five parts"
    if not text.isprintable() and any(not line.isprintable() for line in text.split("\n")):
        return "the message has control characters"
    if text not in done.err:
        return "stderr does not have the message"
    if "itself fails" in text:
        return "it is called a defect of the checker"
    at = text.rpartition("  at:  ")[2]
    if at == "unknown":
        return "no line is named"
    return "" if case.file in at else f"the line named is {at}"


def fuzz(
    commands: Commands, folder: Path, seed: int, *, times: int | None = None, seconds: float = 0.0
) -> Counter[str]:
    """Check a number of targets, or for a number of seconds.

    Returns:
        How many checks ended with each status.

    Raises:
        AssertionError: A check did not end as it should.
    """
    (folder / "folder.py").mkdir()
    (folder / "folder").mkdir()
    counts, end, number = Counter[str](), time.monotonic() + seconds, 0
    while number < times if times is not None else time.monotonic() < end:
        size = 8 if times is None else min(8, times - number)
        cases = [drawn(seed * 1_000_000 + number + n, folder) for n in range(size)]
        number += size
        done = commands.run_all([case.words for case in cases], path=str(folder))
        for case, one in zip(cases, done, strict=True):
            wrong = verify(case, one)
            told = f"out:\n{one.out[:3000]}\nerr:\n{one.err[-3000:]}\n{case.source}"
            assert not wrong, f"case {case.seed}: {wrong}\n{case.words}\n{told}\n{dict(counts)}"
            counts[f"status {one.status}"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    commands = Commands()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(fuzz(commands, Path(folder), asked.seed, seconds=asked.seconds)))
    commands.close()


if __name__ == "__main__":
    main()
