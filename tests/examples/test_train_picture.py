"""What a run of the training example leaves to look at: in letters, drawn, and for TensorBoard."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import train
import train_picture

# Two layers of four experts. The first is used alone in layer 0; layer 1 uses all alike.
STEPS = [
    {"step": number, "loss": 5.0 - number, "counts": [[8, 0, 0, 0], [2, 2, 2, 2]]}
    for number in (1, 2, 3)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = "".join(json.dumps(step) + "\n" for step in STEPS)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_in_letters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(train_picture, "find_spec", return_value=None):
        assert train_picture.draw(folder) == [folder / "metrics.jsonl", folder / "picture.txt"]
    lines = (folder / "picture.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == [*lines, ""]
    assert lines[0] == "loss, steps 1 to 3" and lines[1].split() == ["4.000", "|*"]
    assert lines[12].split() == ["2.000", "|", "*"]
    shown = ["|@@@|", "|   |", "|   |", "|   |"]
    assert [line[13:] for line in lines[15:19]] == shown
    assert len({line[13:] for line in lines[19:23]}) == 1 and lines[19].startswith(" layer 1")


def test_nothing_to_draw_yet(tmp_path: Path) -> None:
    assert train_picture.draw(tmp_path) == []


def test_with_matplotlib(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `dev`, is not installed")
    pyplot: Any = import_module("matplotlib.pyplot")
    figures = list[Any]()
    with patch.object(pyplot, "close", figures.append):
        assert train_picture.draw(folder) == [folder / "metrics.jsonl", folder / "picture.png"]
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    above, below, bar = figures[0].axes
    assert above.lines[0].get_xydata().tolist() == [[1.0, 4.0], [2.0, 3.0], [3.0, 2.0]]
    (image,) = below.images
    assert image.get_array().tolist() == [[4.0] * 3, *[[0.0] * 3] * 3, *[[1.0] * 3] * 4]
    assert tuple(image.get_extent()) == (0.5, 3.5, 7.5, -0.5)
    assert [tick.get_text() for tick in below.get_yticklabels()] == ["layer 0", "layer 1"]
    assert "times the mean" in bar.get_ylabel()
    pyplot.close(figures[0])


def test_for_tensorboard(tmp_path: Path) -> None:
    """Of a run that was resumed after step 2: what came after it the first time is gone."""
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    line = {"norm": 1.0, "tokens_per_second": 9, "balance": 2.0}
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        metrics = train.Metrics(tmp_path, done)
        for step in steps:
            metrics.write({"step": step, "loss": 10.0 * done + step, **line})
        metrics.close()
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "norm", "tokens_per_second", "balance"}
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]
