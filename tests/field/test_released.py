"""Real bugs in released versions are found, and nothing is found in their fixed versions."""

import pytest

from tests.field.released import RELEASES, Release, report


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_a_release(release: Release) -> None:
    found = report(release, "--layout", "tp 2", "--layout", "dp 2 tp 2")
    compared = [run for run in found["runs"] if run["compared"]]
    assert compared and all(run["zero"] < run["compared"] / 2 for run in compared)
    told = [(f["tensors"], f["right"]) for f in found["findings"]]
    assert told == ([([f"gradient of {release.tensor}"], release.right)] if release.bug else [])
    assert found["status"] == (1 if release.bug else 0)
