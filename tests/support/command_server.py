"""`spmd-moe`, or a program, many times without importing torch: a process that forks for each.

It has never run a backward, and torch forbids forked processes to run one where their parent has.
Each command gets a session and stdout of its own, and is killed when it does not end.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

LONGEST = 120.0  # seconds until a command counts as hanging; a busy machine is slow
AT_ONCE = 4


@dataclass(frozen=True)
class Done:
    """How a command ended: its status (None if it was killed), what it printed, and its time."""

    status: int | None
    out: str
    err: str
    seconds: float = 0.0


class Commands:
    """The client: starts the server, and asks it.

    A first word that ends in `.py` is a program; all others are words of `spmd-moe`.
    """

    def __init__(self, *paths: str) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", __name__, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, path: str = "") -> Done:
        return self.run_all([words], path=path)[0]

    def run_all(self, commands: Iterable[Sequence[str]], path: str = "") -> list[Done]:
        """All of them, a few at a time; `path` is where modules are looked for, too."""
        asked = {"commands": [list(words) for words in commands], "path": path}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(f"{json.dumps(asked)}\n")
        self.server.stdin.flush()
        return [Done(**done) for done in json.loads(self.server.stdout.readline())]

    def close(self) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(30)  # not for the end of its stdout, which a copy of a target may hold
        self.server.stdout.close()


@dataclass
class _Running:
    pid: int
    out: IO[bytes]
    err: IO[bytes]
    end: float


def _serve() -> None:
    from spmd_moe.__main__ import main
    from spmd_moe.check import command_line, compare_one_process  # noqa: F401  # what a fork need not import

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        waiting = list(enumerate(asked["commands"]))[::-1]
        running: dict[int, _Running] = {}
        done: dict[int, Any] = {}
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                number, words = waiting.pop()
                running[number] = _start(main, words, asked["path"])
            for number, command in list(running.items()):
                pid, status = os.waitpid(command.pid, os.WNOHANG)
                if pid or time.monotonic() > command.end:
                    ended = os.waitstatus_to_exitcode(status) if pid else None
                    done[number] = _finish(running.pop(number), ended)
            time.sleep(0.01)
        answers.write(json.dumps([done[number] for number in sorted(done)]) + "\n")
        answers.flush()


def _start(main: Any, words: list[str], path: str) -> _Running:
    out, err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115  # closed by _finish
    pid = os.fork()
    if pid:
        return _Running(pid, out, err, time.monotonic() + LONGEST)
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if path:
        sys.path.insert(0, path)
        os.chdir(path)
    status: object = 99
    try:
        if words and words[0].endswith(".py"):
            sys.argv = words
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
            status = 0
        else:
            sys.argv = ["spmd-moe", *words]
            status = main()
    except SystemExit as leaving:
        status = leaving.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 98)


def _finish(command: _Running, status: int | None) -> dict[str, object]:
    if status is None:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        os.waitpid(command.pid, 0)
    texts = []
    for file in (command.out, command.err):
        file.seek(0)
        texts.append(file.read().decode(errors="backslashreplace"))
        file.close()
    took = LONGEST - (command.end - time.monotonic())
    return {"status": status, "out": texts[0], "err": texts[1], "seconds": took}


if __name__ == "__main__":
    _serve()
