"""What share of small placement mistakes in the layer itself the static check catches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants import FILES, ROOT, mutants
from tests.test_typecheck import mypy

# What is not caught, and why not. Each is a limit of a check that sees kinds and no values.
DATA = "which axes, is data here: the batch is balanced as one, or by sequence"
VARYING = "rows of its own on every rank before and after: V says no more (rule X11, by values)"
CONSTANT = "a constant has no placement that could be wrong before it is used"
LOOP = "R and I differ in the gradient alone, and counts on the host have none"
SURVIVORS = {
    "losses:totals:1:left out": DATA,
    "losses:totals:2:left out": DATA,
    "losses:balance_loss:3:left out": DATA,
    "losses:declared:4:left out": DATA,
    "losses:_summed:5:swapped": DATA,
    "losses:_summed:5:src=R": DATA,
    "losses:_summed:5:src=I": DATA,
    "losses:_summed:5:src=S(0)": DATA,
    "losses:_summed:5:dst=I": DATA,
    "losses:_summed:5:dst=P": DATA,
    "losses:_summed:5:dst=S(0)": DATA,
    "dispatch/all_to_all:dispatch:0:left out": VARYING,
    "dispatch/all_to_all:collect:2:left out": VARYING,
    "dispatch/all_to_all:_send:3:left out": VARYING,
    "dispatch/all_gather:_arrive:0:left out": CONSTANT,
    "dispatch/all_gather:_count:3:dst=I": LOOP,
    "dispatch/all_gather:_count:3:dst=P": LOOP,
}


@pytest.mark.long
def test_mistakes_in_the_layer_are_caught(tmp_path: Path) -> None:
    made = list(mutants())
    for number, mutant in enumerate(made):
        (tmp_path / f"mutant_{number:03}.py").write_text(mutant.source)
    for file in FILES:  # as they are, they are right
        text = (ROOT / "spmd_moe" / f"{file}.py").read_text()
        (tmp_path / f"mutant_{file.replace('/', '_')}.py").write_text(text)
    config = tmp_path / "pyproject.toml"
    settings = (ROOT / "pyproject.toml").read_text()
    config.write_text(settings.replace("\nstrict = [", '\nstrict = ["mutant_*",', 1))
    said = mypy("--config-file", config, *sorted(tmp_path.glob("*.py")))
    caught = set(re.findall(r"mutant_(\w+)\.py:\d+: error: .*\[placement-\w+\]", said))
    assert caught.isdisjoint(file.replace("/", "_") for file in FILES)
    survived = [m.name for number, m in enumerate(made) if f"{number:03}" not in caught]
    assert set(survived) == set(SURVIVORS)
    assert len(made) > 130 and len(survived) < len(made) / 8
