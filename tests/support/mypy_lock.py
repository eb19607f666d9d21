"""One run of mypy at a time: two would wait for one database, or would both read torch."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".mypy_cache"


@contextmanager
def mypy_alone() -> Iterator[None]:
    """Wait until no other process runs mypy here. Not to be nested."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
