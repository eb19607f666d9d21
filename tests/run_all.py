"""One command decides: formatter, linter, mypy --strict, then pytest; the first failure ends it.

python tests/run_all.py                          # everything but what is marked long
python tests/run_all.py --long                   # that too
python tests/run_all.py tests/core/test_mesh.py -x    # the same checks; these words go to pytest
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a program, Python puts its own folder there

from tests.support.mypy_lock import mypy_alone  # noqa: E402

INSTALL = "pip install -c .ci/constraints.txt -e '.[dev]'    in a virtual environment"
# Each tool runs as `python -m <words>`, configured in pyproject.toml; then, what helps on failure.
CHECKS = [
    ("ruff format --check .", "python -m ruff format .         rewrites the files"),
    ("ruff check .", "python -m ruff check --fix .    repairs what is safe to repair"),
    ("mypy", "repair the types; an ignore needs its code in [brackets] and its reason"),
]
TESTS = ("pytest -q --durations=10", "python -m pytest -x tests/<file>::<test>    runs one alone")
# Processes that run tests at the same time: one more than CI has cores, as many tests wait often.
# Each runs the files that no other has claimed (tests/support/shared_queue.py).
LANES = 3


def missing_tools() -> list[str]:
    tools = dict.fromkeys(words.split()[0] for words, _ in (*CHECKS, TESTS))
    return [name for name in tools if find_spec(name) is None]


def start(words: str) -> int:
    print(f"== python -m {words}", flush=True)
    return subprocess.run([sys.executable, "-m", *words.split()], cwd=ROOT).returncode


def checked(words: str, advice: str) -> int:
    """The status of a check; says how long it took, and what helps if it failed."""
    begin = time.monotonic()
    status = start(words)
    took = f"after {time.monotonic() - begin:.1f} s"
    print(f"== failed {took}. What helps: {advice}" if status else f"== ok {took}", flush=True)
    return status


def in_lanes(words: list[str], *, long: bool) -> int:
    """mypy and all tests, in several processes; what those beside say is shown at the end."""
    # Else each process that tests start compiles all files again, and pytest rewrites all asserts.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    tests = [sys.executable, "-m", *words, "-p", "tests.support.shared_queue"]
    chosen = [] if long else ["-m", "not long"]
    with tempfile.TemporaryDirectory() as queue, ExitStack() as ending:
        # In one word: pytest takes a folder in a word of its own for the root of the tests.
        tests += [f"--queue={queue}", *chosen]
        beside = [ending.enter_context(aside(tests)) for _ in range(LANES - 1)]
        with mypy_alone():
            status = checked(*CHECKS[-1])
        if status:
            return status
        status = subprocess.run([*tests, "--with-mypy"], cwd=ROOT).returncode
        for finish in beside:
            status = finish() or status
    return status


@contextmanager
def aside(command: list[str]) -> Iterator[Callable[[], int]]:
    """A process that is begun now; to finish it is to wait for it, and to show what it said."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)

        def finish() -> int:
            print("== and what ran beside it:", flush=True)
            status = process.wait()
            said.seek(0)
            print(said.read(), end="", flush=True)
            return status

        try:
            yield finish
        finally:
            process.kill()


def main(pytest_words: list[str]) -> int:
    if {"-h", "--help"}.intersection(pytest_words):
        print(__doc__.strip())
        return 0
    if missing := missing_tools():
        print(f"== {sys.executable} has no {' and no '.join(missing)}. What helps: {INSTALL}")
        return 1
    words, advice = TESTS
    in_parts = pytest_words in ([], ["--long"])  # mypy then runs beside tests
    for check in CHECKS[:-1] if in_parts else CHECKS:
        if status := checked(*check):
            return status
    # Said before and not after, so that pytest's summary is the last line of all.
    print(f"== if a test fails: {advice}", flush=True)
    if in_parts:
        return in_lanes(words.split(), long=bool(pytest_words))
    return start(" ".join([words, *pytest_words]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
