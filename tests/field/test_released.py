"""Real bugs in released versions are found, and nothing is found in their fixed versions."""

import pytest

from tests.field.released import RELEASES, Release, as_due, report


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_a_release(release: Release) -> None:
    layouts = ("--layout", "tp 2", "--layout", "dp 2 tp 2")
    found = report(release, *layouts)
    assert as_due(release, found), found["findings"]
