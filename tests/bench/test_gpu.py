"""The GPU script on a CPU: it runs as far as it can, and an item that fails is a row."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.bench.gpu import __main__ as gpu
from tests.bench.gpu import on_one, on_ranks
from tests.bench.gpu.__main__ import ITEMS
from tests.bench.gpu.run_items import Item, NotHereError, run_item, table
from tests.support.docs_blocks import DOCS, ROOT
from tests.support.workers import run


def test_an_item_that_fails_is_a_row() -> None:
    def wrong(device: str) -> str:
        raise ValueError(f"a | b on {device}")

    def slow(device: str) -> str:
        time.sleep(60)
        return ""

    def elsewhere(device: str) -> str:
        raise NotHereError("needs two")

    functions = (lambda device: f"on {device}", wrong, slow, elsewhere)
    rows = [run_item(Item(f"{n}", function, 3), "cpu") for n, function in enumerate(functions)]
    states = ["seen", "not seen", "not seen", "not on this machine"]
    assert [row.state for row in rows] == states
    assert rows[0].text == "on cpu" and rows[3].text == "needs two"
    assert rows[1].text.startswith("ValueError at test_gpu.py:") and "a / b on cpu" in rows[1].text
    assert rows[2].text == "no answer within 3 s" and rows[2].seconds < 20
    assert table(rows, "here").count("|\n") == 6


def test_what_an_item_started_can_end_its_own(tmp_path: Path) -> None:
    """As torchrun ends its ranks, which are in sessions of their own and would hold the GPU."""

    def slow(device: str) -> str:
        script = f"trap 'touch {tmp_path}/ended; exit' TERM; sleep 60 & wait"
        subprocess.run(["sh", "-c", script])
        return ""

    assert run_item(Item("", slow, 3), "cpu").text == "no answer within 3 s"
    assert (tmp_path / "ended").exists()


def test_it_takes_at_most_minutes() -> None:
    total = sum(item.seconds for item in ITEMS)
    assert total <= 400  # limits; items take about half
    assert f"add up to {total:.0f} s." in (DOCS / "gpus.md").read_text().replace("\n", " ")
    assert f"add up to {total:.0f} s." in str(gpu.__doc__)
    assert len({item.name for item in ITEMS}) == 10


@pytest.mark.parametrize("item", ["grouped_matmul", "waits"])
def test_items_that_run_on_a_cpu(item: str) -> None:
    assert getattr(on_one, item)("cpu")


def test_deterministic_item() -> None:
    try:
        assert "equal to the bit" in on_one.deterministic("cpu")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("item", ["cuda_graph", "beside_peers"])
def test_items_that_need_a_gpu(item: str) -> None:
    with pytest.raises(NotHereError, match=r"CUDA|CPUs"):
        getattr(on_one, item)("cpu")


@pytest.mark.gloo
def test_what_ranks_run() -> None:
    assert all("2 ranks" in text for text in run(2, on_ranks.start, "cpu"))
    assert all("equal to one process" in text for text in run(2, on_ranks.empty_ranks, "cpu"))


@pytest.mark.long
def test_from_start_to_end() -> None:
    words = [sys.executable, "-m", "tests.bench.gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    states = [row.split(" | ")[1] for row in rows]
    assert len(rows) == len(ITEMS)
    assert set(states) <= {"seen", "not on this machine"}, done.stdout
