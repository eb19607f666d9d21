"""Several processes that divide test files: each file runs once, and none is left out."""

from __future__ import annotations

from pathlib import Path

from tests.support.shared_queue import RUN_MYPY, SECONDS, claimed, in_order

ROOT = Path(__file__).resolve().parents[2]
FILES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def test_each_file_is_claimed_once(tmp_path: Path) -> None:
    lanes = [claimed(in_order(FILES, with_mypy=first), tmp_path) for first in (True, False, False)]
    ran: list[list[str]] = [[], [], []]
    while any(new := [next(lane, "") for lane in lanes]):
        for files, name in zip(ran, new, strict=True):
            files += [name] * bool(name)
    assert sorted(ran[0] + ran[1] + ran[2]) == FILES
    assert all(name.startswith(RUN_MYPY) for name in ran[0][:4])
    assert all(len(files) > 10 for files in ran)


def test_lists_name_files_that_exist() -> None:
    assert set(SECONDS) <= set(FILES)
    assert all(any(name.startswith(start) for name in FILES) for start in RUN_MYPY)
