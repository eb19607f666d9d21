"""A pytest plugin: several processes divide the test files of one run among them.

    python -m pytest -p tests.support.shared_queue --queue FOLDER      # in each process

Each process collects all files, and runs those that it is the first to claim: a file in FOLDER is
the claim. Tests of one file stay together, since they share fixtures and caches. Files that take
long are claimed first, so that none is left for the end. A file that is in no list runs as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

# Seconds of CPU, of the files that take many.
SECONDS: dict[str, int] = {}
# These run mypy with the cache of the repository, which one process at a time may use.
RUN_MYPY = (
    "tests/static/",
    "tests/catalogue/",
    "tests/examples/test_examples.py",
    "tests/test_docs.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--queue", type=Path, help="run the files that no other process has claimed")
    parser.addoption("--with-mypy", action="store_true", help="and first those that run mypy")


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def in_order(files: list[str], *, with_mypy: bool) -> list[str]:
    """The files that a process may claim, in the order in which it tries."""
    chosen = [name for name in files if with_mypy or not name.startswith(RUN_MYPY)]
    return sorted(
        chosen, key=lambda name: (not name.startswith(RUN_MYPY), -SECONDS.get(name, 0), name)
    )


def claimed(files: list[str], queue: Path) -> Iterator[str]:
    """Those that this process is the first to claim; each when the one before is done."""
    for name in files:
        try:
            (queue / name.replace("/", ".")).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield name


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """As pytest's own loop, over the tests of one claimed file after another."""
    queue: Path | None = session.config.option.queue
    if queue is None or session.testsfailed:
        return None  # pytest's own loop, which reports what could not be collected
    tests = {name: list(of_file) for name, of_file in groupby(session.items, _file)}
    files = in_order(list(tests), with_mypy=session.config.option.with_mypy)
    following = (test for name in claimed(files, queue) for test in tests[name])
    test = next(following, None)
    while test is not None:
        after = next(following, None)
        session.config.hook.pytest_runtest_protocol(item=test, nextitem=after)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        test = after
    return True
