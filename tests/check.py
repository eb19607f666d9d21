"""One command decides: formatter, linter, mypy --strict, then pytest; the first failure ends it.

python tests/check.py                          # everything but what is marked long
python tests/check.py --long                   # that too
python tests/check.py tests/test_mesh.py -x    # the same checks; these words go to pytest
"""

import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

INSTALL = "pip install -c .ci/constraints.txt -e '.[dev]'    in a virtual environment"
# Each tool runs as `python -m <words>`, configured in pyproject.toml; then, what helps on failure.
CHECKS = [
    ("ruff format --check .", "python -m ruff format .         rewrites the files"),
    ("ruff check .", "python -m ruff check --fix .    repairs what is safe to repair"),
    ("mypy", "repair the types; an ignore needs its code in [brackets] and its reason"),
]
TESTS = ("pytest -q --durations=10", "python -m pytest -x tests/<file>::<test>    runs one alone")
# Two processes at the same time, each with workers of its own: these tests, and all others, among
# which are those that run mypy (with one cache). On two cores each half takes about as long.
ONE_HALF = """
    check check_values compile_parts decode determinism dispatch experts forecast layer losses
    obligations permute redistribute router
"""


def missing_tools() -> list[str]:
    return [name for name in ("ruff", "mypy", "pytest") if find_spec(name) is None]


def start(number: int, words: str) -> int:
    print(f"== {number} of {len(CHECKS) + 1}: python -m {words}", flush=True)
    return subprocess.run([sys.executable, "-m", *words.split()], cwd=ROOT).returncode


def both_halves(words: list[str], *, long: bool) -> int:
    """All tests, in two processes; what the first one says is shown when the second one is done."""
    base = [sys.executable, "-m", *words] + ([] if long else ["-m", "not long"])
    files = [f"tests/test_{name}.py" for name in ONE_HALF.split()]
    others = [f"--ignore={file}" for file in files]
    with tempfile.TemporaryFile("w+") as said:
        beside = subprocess.Popen([*base, *files], cwd=ROOT, stdout=said, stderr=said)
        try:
            status = subprocess.run([*base, *others], cwd=ROOT).returncode
            print("== and the other half, which ran beside it", flush=True)
            status = beside.wait() or status
        finally:
            beside.kill()
        said.seek(0)
        print(said.read(), end="", flush=True)
    return status


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
        print(f"== {len(CHECKS) + 1} of {len(CHECKS) + 1}: python -m {words}, in two halves")
        sys.stdout.flush()
        return both_halves(words.split(), long=bool(pytest_words))
    return start(len(CHECKS) + 1, " ".join([words, *pytest_words]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
