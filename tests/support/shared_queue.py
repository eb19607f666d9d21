"""A pytest plugin: several processes divide the test files of one run among them.

    python -m pytest -p tests.support.shared_queue --queue=FOLDER      # in each process

Each process collects all files, and runs those that it is the first to claim: a file in FOLDER is
the claim. Tests of one file stay together, since they share fixtures and caches. Files that take
long are claimed first, so that none is left for the end. A file that is in no list runs as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

# Seconds of CPU, of the files that take many. They need not be exact.
SECONDS = {
    "tests/catalogue/test_catalogue.py": 130,
    "tests/layer/test_moe.py": 100,
    "tests/sanitize/test_sanitizer.py": 80,
    "tests/train/test_checkpoint.py": 60,
    "tests/examples/test_train_resume.py": 60,
    "tests/core/test_redistribute.py": 50,
    "tests/layer/test_compile_parts.py": 50,
    "tests/examples/test_examples.py": 45,
    "tests/static/test_daemon.py": 40,
    "tests/hf/test_checkpoints.py": 40,
    "tests/hf/test_models.py": 40,
    "tests/check/test_forecast.py": 40,
    "tests/test_docs.py": 40,
    "tests/train/test_parallelize.py": 40,
    "tests/examples/test_train.py": 40,
    "tests/static/test_plugin.py": 30,
    "tests/static/test_typecheck.py": 30,
    "tests/check/test_check.py": 25,
    "tests/check/test_command_line.py": 20,
    "tests/hf/test_families.py": 20,
    "tests/test_errors.py": 20,
    "tests/train/test_checkpoint_fuzz.py": 17,
    "tests/test_recipes.py": 15,
    "tests/check/test_checked_layers.py": 14,
}
# These run mypy, one at a time: the process that has filled its cache begins with them.
RUN_MYPY = ("tests/static/", "tests/test_docs.py", "tests/examples/test_examples.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--queue", type=Path, help="run the files that no other process has claimed")
    parser.addoption("--with-mypy", action="store_true", help="begin with those that run mypy")


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def in_order(files: list[str], *, with_mypy: bool) -> list[str]:
    """The files in the order in which a process tries to claim them."""
    return sorted(
        files,
        key=lambda name: (name.startswith(RUN_MYPY) != with_mypy, -SECONDS.get(name, 0), name),
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
