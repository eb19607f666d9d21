"""Draw the pictures of the documentation: the two presentations of a mesh, and a dispatch.

    python docs/draw.py --write       # rewrites docs/_static/*.svg; a test compares them

docs/_static/training.png is made by examples/train_picture.py from a run of examples/train.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

STATIC = Path(__file__).resolve().parent / "_static"
COLORS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2"]
STYLE = "font-family: sans-serif; font-size: 13px"


def text(x: float, y: float, words: str, color: str = "#333", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, color: str, words: str = "") -> str:
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
    label = text(x + width / 2, y + height / 2 + 5, words, "white") if words else ""
    return f'{shape}fill="{color}"/>{label}'


def arrow(x: float, y: float, to_x: float, to_y: float, color: str) -> str:
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{color}" '
        'stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def picture(width: int, height: int, parts: Iterable[str]) -> str:
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{STYLE}">'
    )
    ground = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, tip, ground, *parts, "</svg>"]) + "\n"


def grid(
    left: float, rows: list[list[int]], names: tuple[str, str], colors: list[str]
) -> list[str]:
    """Ranks in rows and columns, each in its color, with the names of both axes."""
    size, gap, top = 56, 8, 60
    parts = [text(left + len(rows[0]) * (size + gap) / 2, top - 12, f"{names[1]} -&gt;")]
    parts.append(text(left - 34, top + len(rows) * (size + gap) / 2, f"{names[0]} v"))
    for r, row in enumerate(rows):
        for c, rank in enumerate(row):
            x, y = left + c * (size + gap), top + r * (size + gap)
            parts.append(box(x, y, size, size, colors[rank], f"rank {rank}"))
    return parts


def mesh_picture() -> str:
    """Eight ranks as dp 2 x tp 4, and as edp 2 x ep 4 or edp 1 x ep 8."""
    colors = [COLORS[rank % 4] for rank in range(8)]
    dense = grid(90, [[0, 1, 2, 3], [4, 5, 6, 7]], ("dp 2", "tp 4"), colors)
    expert = grid(460, [[0, 1, 2, 3], [4, 5, 6, 7]], ("edp 2", "ep 4"), colors)
    parts = [
        text(90, 24, "Dense presentation: dp 2 x cp 1 x tp 4", anchor="start"),
        *dense,
        text(460, 24, "Expert presentation: edp 2 x ep 4 x etp 1", anchor="start"),
        *expert,
        text(90, 224, "attention, router, norms", anchor="start"),
        text(90, 244, "weights are R or I on dp", anchor="start"),
        text(460, 224, "experts: one color holds the same experts", anchor="start"),
        text(460, 244, "weights are S(0) on ep, R on edp", anchor="start"),
    ]
    return picture(740, 262, parts)


# Each rank has three tokens; the number is the expert that a token chose. Rank r holds expert r.
CHOICES = [[0, 1, 1], [2, 0, 1], [2, 2, 0]]


def dispatch_picture() -> str:
    """Rows sent to the ranks of their experts, multiplied there, and sent back."""
    columns = {"tokens": 70, "sorted by expert": 200, "at the experts": 400, "combined": 600}
    parts = [text(x + 34, 24, name) for name, x in columns.items()]
    arrived: list[list[tuple[int, int]]] = [[] for _ in CHOICES]
    for rank, chosen in enumerate(CHOICES):
        parts.append(text(30, 40 + rank * 110 + 46, f"rank {rank}"))
        for token, expert in enumerate(chosen):
            arrived[expert].append((rank, token))
    for rank, chosen in enumerate(CHOICES):
        top = 40 + rank * 110
        order = sorted(range(3), key=lambda token: chosen[token])
        for token, expert in enumerate(chosen):
            name = f"{'abc'[token]}{rank}"
            for x in (columns["tokens"], columns["combined"]):
                parts.append(box(x, top + token * 30, 68, 24, COLORS[expert], name))
        for place, token in enumerate(order):
            expert = chosen[token]
            y = top + place * 30
            parts.append(
                box(
                    columns["sorted by expert"], y, 68, 24, COLORS[expert], "abc"[token] + str(rank)
                )
            )
            to_y = 40 + expert * 110 + arrived[expert].index((rank, token)) * 24 + 12
            back_y = top + token * 30 + 12
            parts.append(arrow(columns["sorted by expert"] + 70, y + 12, 398, to_y, "#777"))
            parts.append(arrow(470, to_y, columns["combined"] - 2, back_y, "#777"))
    for expert, rows in enumerate(arrived):
        for place, (rank, token) in enumerate(rows):
            y = 40 + expert * 110 + place * 24
            parts.append(box(400, y, 68, 20, COLORS[expert], "abc"[token] + str(rank)))
    parts.append(text(335, 372, "dispatch: all-to-all of rows"))
    parts.append(text(540, 372, "collect: its inverse"))
    return picture(700, 386, parts)


PICTURES = {"mesh.svg": mesh_picture, "dispatch.svg": dispatch_picture}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        if "--write" in sys.argv:
            (STATIC / name).write_text(draw())
        else:
            print(name, len(draw()), "bytes")
