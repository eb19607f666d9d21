"""The page on mutants of the layer says what the checks say."""

from __future__ import annotations

import pytest

from tests.catalogue.mutants import FILES, mutants
from tests.catalogue.mutations import PASSED, RATES, by_mypy, by_running, rates, written
from tests.catalogue.survivors import ARGUED

SAMPLE = 25  # of so many mutants, one is run here


def test_the_page_is_of_these_mutants_and_the_docs_have_its_rates() -> None:
    page = written()
    names = [mutant.name for file in FILES for mutant in mutants(file)]
    assert names == list(page), "python -m tests.catalogue.mutations --write --new"
    assert {name for name, found in page.items() if found == (PASSED, PASSED)} == set(ARGUED)
    assert rates(list(page.values())) in RATES.read_text()


@pytest.mark.long
def test_mypy_says_of_each_what_the_page_says() -> None:
    chosen = [m for file in FILES for m in mutants(file)]
    assert by_mypy(chosen) == {name: static for name, (static, _) in written().items()}


@pytest.mark.long
def test_a_sample_of_them_is_found_as_the_page_says() -> None:
    page = written()
    chosen = [m for file in FILES for m in mutants(file)][::SAMPLE]
    found = {m.name: by_running(m, page[m.name][0] == PASSED).split()[0] for m in chosen}
    assert found == {name: _checked(page[name][1]) for name in found}
    assert len(set(found.values())) > 1


def _checked(run: str) -> str:
    """Which check it was; tests of the layer are none."""
    level = run.split()[0]
    return PASSED if level == "tests" else level
