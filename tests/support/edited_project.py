"""A small project that is edited step by step, for mypy's daemon and for plain mypy.

Both run in this process: the daemon through all steps first, as mypy's state of a process is one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from mypy import api
from mypy.dmypy_server import Server
from mypy.main import process_options

from spmd_moe.static.problems_found import RAISE
from tests.support import small_mypy_world as small_world

Files = dict[str, str | None]  # texts by name; None is no such file


@dataclass
class Step:
    """What the files were after an edit, and what the daemon said of them."""

    files: Files
    said: list[str]


@dataclass
class Project:
    folder: Path
    plugin: bool = True
    clock: int = 1_000_000_000
    files: Files = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = small_world.build(self.folder, plugin=self.plugin)
        self.sources = self.folder / "sources"
        self.sources.mkdir()
        self.words = ["--config-file", str(settings), "--no-pretty", "--no-error-summary"]
        self.words += ["--no-sqlite-cache"]
        self.server: Server | None = None

    def edit(self, **files: str | None) -> list[str]:
        """Change files, given by the names of their modules, and ask the daemon."""
        self._write(files)
        self.files = {**self.files, **files}
        self.steps.append(Step(self.files, self._ask()))
        return self.steps[-1].said

    def _write(self, files: Files) -> None:
        self.clock += 10  # the daemon looks at the time of a file first
        for name, text in files.items():
            path = self.sources / f"{name}.py"
            if text is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(text)
                os.utime(path, (self.clock, self.clock))

    def _ask(self) -> list[str]:
        with mock.patch.dict(os.environ, {RAISE: "1"}):
            words = ["--cache-dir", os.devnull, *self.words, str(self.sources)]
            sources, options = process_options(words, require_targets=True, server_options=True)
            self.server = self.server or Server(options, str(self.folder / "status"))
            told = self.server.check(sources, False, False, 80)
        return sorted((told["out"] + told["err"]).splitlines())

    def plain(self, step: Step) -> list[str]:
        """What plain mypy says of the files of a step; only the small world is in its cache."""
        self._write(dict.fromkeys(self.files))
        self._write(step.files)
        cache = self.folder / "cache"
        for name in self.files:
            for path in cache.glob(f"*/{name}.*"):
                path.unlink()
        with mock.patch.dict(os.environ, {RAISE: "1"}):
            words = ["--cache-dir", str(cache), *self.words, str(self.sources)]
            out, trouble, _ = api.run(words)
        return sorted((out + trouble).splitlines())
