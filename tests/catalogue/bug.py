"""What a bug of the catalogue is: words replaced in correct code, and what is expected of it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.catalogue.code import Edit

TARGETS = "tests.catalogue.targets"


@dataclass(frozen=True)
class Bug:
    """`target` is a function of targets.py; the check and the run with values are of that.

    `rule` finds it, at a line that has `at` in it. Default: one of the lines that were put in.
    Where no rule of the traced check does, `rule` is empty: then `values` says that the check with
    values does, or `open` says which level will, or why none can.
    """

    id: str  # of the family in the catalogue, and a letter
    title: str
    edits: tuple[Edit, ...]
    target: str = "layer"
    layout: str = "dp 2 tp 2 ep 2"
    tokens: tuple[int, ...] = (1, 5)
    rule: str = ""
    values: bool = False
    open: str = ""
    at: str = ""
    run: int = 5  # tokens of the run with values
    shows: str = "values"  # what goes wrong there: values, crash, hang

    @property
    def family(self) -> str:
        return self.id[:3]


@dataclass(frozen=True)
class Fact:
    """A mistake of arithmetic, made outside of any layer: `wrong` and `right` are other numbers."""

    id: str
    title: str
    wrong: object
    right: object
    open: str  # which level will see it

    @property
    def family(self) -> str:
        return self.id[:3]


def edit(module: str, old: str, new: str) -> tuple[Edit, ...]:
    """One replacement, in a file of the layer or of the tests."""
    return (Edit(module if module.startswith("tests.") else f"spmd_moe.{module}", old, new),)


def part(old: str, new: str, file: str = "parts") -> tuple[Edit, ...]:
    return edit(f"tests.catalogue.{file}", old, new)
