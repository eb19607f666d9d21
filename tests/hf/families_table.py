"""The table of families in docs/hf_families.md, written out of the records and of measurements.

python -m tests.hf.families_table --write
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from spmd_moe.hf.families import FAMILIES, UNSUPPORTED
from spmd_moe.hf.family import Family
from spmd_moe.layer.moe_config import ScoreApplication

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hf_families.md"
HEAD = """# Families of Hugging Face transformers

Written by `python -m tests.hf.families_table --write`; transformers 5.24.0.

`spmd_moe.hf.swap` replaces these blocks with our layer. "error" is the largest difference between
the two, in the output and in every gradient, relative to the largest value, for a tiny random
config. In the float64 column, transformers' own casts to float32 are removed. Names in code style
are attributes of the block. If one has a value that the last column does not list, `swap` raises an
error that names it and the missing feature.

| family | block | router | error, float64 | error, float32 | supported values |
|---|---|---|---|---|---|
"""
BELOW = """
These blocks are not supported:

| block | missing feature |
|---|---|
"""


def recipe(family: Family) -> str:
    """How tokens choose, in a few words."""
    if family.routed is not None:
        return "transformers' own router"
    in_block = "." in family.score  # where the block has the name of the score function
    score = f"`{family.score}`" if in_block else family.score.replace("_", " ")
    parts = [score.replace("softmax chosen", "softmax over the chosen")]
    if family.bias is not None:
        parts.append("selection bias")
    if family.groups is not None:
        parts.append(f"groups ranked by their best {family.groups.best}")
    if family.norm is not False:
        parts.append("normalized" if family.norm is True else f"normalized if `{family.norm}`")
    if family.norm_eps:
        parts.append(f"epsilon {family.norm_eps}")
    if family.scale:
        parts.append("scaled")
    if family.softcap is not None:
        parts.append(f"logits capped at `{family.softcap}`")
    if family.choose_by is not None:
        parts.append(f"chosen by {family.choose_by}")
    if family.excluded_score == 0.0:
        parts.append("experts of other groups score 0")
    if family.application is ScoreApplication.ON_INPUT:
        parts.append("weights multiply the input")
    if family.latent is not None:
        parts.append(f"experts between projections if `{family.latent[0]}` is one")
    if family.shared_gate is not None:
        parts.append("gated shared expert")
    elif family.shared is not None:
        parts.append("shared expert")
    return ", ".join(parts)


def only_with(family: Family) -> str:
    """The settings that the layer can express."""
    return "; ".join(
        f"`{need.attribute}` {' or '.join(map(str, need.values))} (else: {need.missing})"
        for need in family.needs
    )


def row(family: Family, *off: str) -> str:
    cells = (family.name, family.block, recipe(family), *off, only_with(family))
    return "| " + " | ".join(cells) + " |\n"


def unsupported() -> str:
    return "".join(f"| {block} | {missing} |\n" for block, missing in sorted(UNSUPPORTED.items()))


def measured(family: Family) -> tuple[str, str]:
    from tests.hf.test_families import worst_error

    worst = (max(worst_error(family, d).values()) for d in (torch.float64, torch.float32))
    in_64, in_32 = (f"{number:.0e}" for number in worst)
    return in_64, in_32


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    torch.set_num_threads(1)  # tensors are tiny
    rows = [row(family, *measured(family)) for family in FAMILIES.values()]
    PAGE.write_text(HEAD + "".join(rows) + BELOW + unsupported())
