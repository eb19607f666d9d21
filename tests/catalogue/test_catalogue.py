"""Every bug of the catalogue is one and is found where it is; correct code is found correct."""

from __future__ import annotations

import pytest

from spmd_moe.check import Layout, run_checks
from spmd_moe.core.errors import MeshError
from spmd_moe.core.mesh import MoEMesh
from tests.catalogue import static, targets
from tests.catalogue.bug import Bug, Fact
from tests.catalogue.catalogue import (
    BUGS,
    EVERYTHING,
    caught,
    degrees,
    goes_wrong,
    right_values,
    traced,
    valued,
)
from tests.catalogue.code import Edit, changed
from tests.catalogue.facts import FACTS
from tests.catalogue.table import PAGE, page
from tests.support.simulated_ranks import fake_world

# Those of the catalogue's summary. B44 is refused by the mesh; see below.
FAMILIES = (
    "B01 B03 B04 B05 B06 B07 B08 B10 B13 B14 B15 B17 B18 B19 B20 B22 B23 B25 B26 B27 B28 B30 B32 "
    "B34 B35 B36 B37 B39 B40 B41 B43 B44"
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_it_is_a_bug(bug: Bug) -> None:
    wrong = goes_wrong(bug)
    expected = (bug.shows, "ranks differ") if bug.shows == "values" else bug.shows
    assert wrong.startswith(expected), wrong or "nothing goes wrong"


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.rule], ids=lambda bug: bug.id)
def test_it_is_found(bug: Bug) -> None:
    assert caught(bug) is not None, str(traced(bug))


@pytest.mark.parametrize("bug", [bug for bug in BUGS if not bug.rule], ids=lambda bug: bug.id)
def test_what_the_traced_check_does_not_see(bug: Bug) -> None:
    """When one of these is found, the table can say so."""
    assert bool(bug.open) != bug.values and traced(bug).ok, str(traced(bug))
    assert (valued(bug) is not None) == bug.values, str(valued(bug))
    assert right_values(bug.target, bug) is None


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_wrong_numbers_are_not_the_right_ones(fact: Fact) -> None:
    assert fact.wrong != fact.right and fact.open


@pytest.mark.parametrize("bug", EVERYTHING, ids=lambda bug: bug.id)
def test_what_mypy_says_or_why_it_does_not(bug: Bug | Fact) -> None:
    """One run of mypy for all. A reason that is out of date fails, too."""
    said = static.verdict(bug, tuple(BUGS))
    assert bool(said) != (bug.id in static.UNSEEN), said


def test_the_reasons_are_of_bugs_and_the_typed_cases_are_marked() -> None:
    assert set(static.UNSEEN) <= {bug.id for bug in EVERYTHING} and all(static.UNSEEN.values())
    assert static.cases()["B40B"] == ("return",) and "ALL_AXES" in static.cases()


CORRECT = sorted({(bug.target, bug.layout, bug.tokens): degrees(bug).world for bug in BUGS}.items())
WIDEST = {target: world for (target, _, _), world in sorted(CORRECT, key=lambda one: one[1])}
# On fewer ranks the same code does no more than on the most; `long` runs these too.
CHOSEN = [
    pytest.param(*case, marks=[pytest.mark.long] * (world < WIDEST[case[0]]))
    for case, world in CORRECT
]


@pytest.mark.parametrize("target,layout,tokens", CHOSEN, ids=lambda value: str(value))
def test_correct_code_is_found_correct(target: str, layout: str, tokens: tuple[int, ...]) -> None:
    bug = next(b for b in BUGS if (b.target, b.layout, b.tokens) == (target, layout, tokens))
    report = run_checks(getattr(targets, target), chosen=[degrees(bug)], tokens=tokens)
    assert report.ok, str(report)


def test_every_family_is_there() -> None:
    assert {bug.family for bug in EVERYTHING} | {"B44"} == set(FAMILIES.split())
    names = [bug.id for bug in EVERYTHING]
    assert len(names) == len(set(names))


def test_experts_are_no_size_of_a_group() -> None:
    """B44: a mesh of as many ranks of ep as there are experts is refused, if there are others."""
    with fake_world(4), pytest.raises(MeshError, match="ep 8 x etp 1 = 8 does not divide the 4"):
        MoEMesh.init("cpu", dp=4, ep=8)


def test_the_table_is_what_the_checks_say() -> None:
    assert PAGE.read_text() == page(), "python -m tests.catalogue.table --write"


def test_changed_code_is_gone_afterwards() -> None:
    import spmd_moe.layer.boundary
    import spmd_moe.layer.moe

    before = spmd_moe.layer.moe.MoE, spmd_moe.layer.boundary.Boundary, targets.made
    edits = (Edit("spmd_moe.layer.boundary", "INSIDE = S(0)", "INSIDE = S(1)"),)
    with changed("x", edits, "tests.catalogue.targets") as code:
        assert code.made is not before[2]
    assert (spmd_moe.layer.moe.MoE, spmd_moe.layer.boundary.Boundary, targets.made) == before
    assert run_checks(targets.layer, chosen=[Layout(tp=2)], tokens=(2,)).ok


def test_words_that_are_not_there_cannot_be_replaced() -> None:
    edits = (Edit("spmd_moe.layer.boundary", "no such words", ""),)
    with (
        pytest.raises(AssertionError, match="0 times, not once"),
        changed("x", edits, "tests.catalogue.targets"),
    ):
        pass
