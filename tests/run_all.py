"""One command decides: formatter, linter, mypy --strict, then pytest; the first failure ends it.

python tests/run_all.py                          # everything but what is marked long
python tests/run_all.py --long                   # that too
python tests/run_all.py tests/core/test_mesh.py -x    # the same checks; these words go to pytest
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

INSTALL = "pip install -c .ci/constraints.txt -e '.[dev]'    in a virtual environment"
# Each tool runs as `python -m <words>`, configured in pyproject.toml; then, what helps on failure.
CHECKS = [
    ("ruff format --check .", "python -m ruff format .         rewrites the files"),
    ("ruff check .", "python -m ruff check --fix .    repairs what is safe to repair"),
    ("mypy", "repair the types; an ignore needs its code in [brackets] and its reason"),
]
TESTS = ("pytest -q --durations=10", "python -m pytest -x tests/<file>::<test>    runs one alone")
# Processes at the same time, each with workers of its own: one for each of these lines, and one for
# all other tests, among which are those that run mypy (with one cache). Each takes about as long.
# There is one more than CI has cores, for many tests wait most of the time.
BESIDE = (
    "layer/moe core/redistribute layer/dispatch layer/experts layer/experts_memory layer/permute "
    "layer/determinism layer/router check/forecast",
    "sanitize/sanitizer train/parallelize train/checkpoint layer/decode layer/balance_losses "
    "train/obligations layer/compile_layer train/recompute core/collectives layer/compile_parts "
    "check/check check/values layer/routing_faults support/workers core/mesh",
)


def missing_tools() -> list[str]:
    tools = dict.fromkeys(words.split()[0] for words, _ in (*CHECKS, TESTS))
    return [name for name in tools if find_spec(name) is None]


def start(number: int, words: str) -> int:
    print(f"== {number} of {len(CHECKS) + 1}: python -m {words}", flush=True)
    return subprocess.run([sys.executable, "-m", *words.split()], cwd=ROOT).returncode


def _test_file(name: str) -> str:
    folder, _, file = name.partition("/")
    return f"tests/{folder}/test_{file}.py"


def in_parts(words: list[str], *, long: bool) -> int:
    """All tests, in several processes; what those beside say is shown when all others are done."""
    base = [sys.executable, "-m", *words] + ([] if long else ["-m", "not long"])
    parts = [[_test_file(name) for name in line.split()] for line in BESIDE]
    others = [f"--ignore={file}" for files in parts for file in files]
    with ExitStack() as ending:
        beside = [ending.enter_context(aside([*base, *files])) for files in parts]
        status = subprocess.run([*base, *others], cwd=ROOT).returncode
        for finish in beside:
            status = finish() or status
    return status


@contextmanager
def aside(command: list[str]) -> Iterator[Callable[[], int]]:
    """A process that is begun now; to finish it is to wait for it, and to show what it said."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)

        def finish() -> int:
            print(f"== and what ran beside it: {' '.join(command[-3:])} ...", flush=True)
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
    for number, (words, advice) in enumerate(CHECKS, 1):
        begin = time.monotonic()
        if status := start(number, words):
            print(f"== failed after {time.monotonic() - begin:.1f} s. What helps: {advice}")
            return status
        print(f"== ok after {time.monotonic() - begin:.1f} s", flush=True)
    words, advice = TESTS
    # Said before and not after, so that pytest's summary is the last line of all.
    print(f"== if a test fails: {advice}", flush=True)
    if pytest_words in ([], ["--long"]):
        print(f"== {len(CHECKS) + 1} of {len(CHECKS) + 1}: python -m {words}, in parts")
        sys.stdout.flush()
        return in_parts(words.split(), long=bool(pytest_words))
    return start(len(CHECKS) + 1, " ".join([words, *pytest_words]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
